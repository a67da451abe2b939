"""The configuration of a checkpointer, one part for each component."""

from dataclasses import dataclass, field

from lastgood.barriers import BarrierConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig


@dataclass
class CheckpointerConfig:
    """All of it; parts may be assigned after it was made, until a checkpointer is built from it."""

    writer_config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig)
