"""The configuration of a checkpointer, one part for each component."""

from dataclasses import dataclass, field

from lastgood.barriers import BarrierConfig
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.staging import CheckpointStagerConfig


@dataclass
class CheckpointerConfig:
    """All of it; parts may be assigned after it was made, until a checkpointer is built from it.

    Synchronous checkpointers have no use for ``staging_config`` and ``process_config``.
    """

    writer_config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig)
    staging_config: CheckpointStagerConfig = field(default_factory=CheckpointStagerConfig)
    process_config: CheckpointProcessConfig = field(default_factory=CheckpointProcessConfig)
