"""The configuration of a checkpointer, one part for each component."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from lastgood.barriers import BarrierConfig
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.staging import CheckpointStagerConfig


@dataclass
class CheckpointerConfig:
    """All of it; parts may be assigned after it was made, until a checkpointer is built from it.

    Synchronous checkpointers have no use for ``staging_config`` and ``process_config``. ``replicated``: the patterns
    (as of :mod:`fnmatch`) of the key paths of plain tensors that are the same on all ranks, such as ``"model.*"`` under
    data parallelism: the ranks divide the writing of them, and a save fails where they are not the same.
    """

    writer_config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier_config: BarrierConfig = field(default_factory=BarrierConfig)
    staging_config: CheckpointStagerConfig = field(default_factory=CheckpointStagerConfig)
    process_config: CheckpointProcessConfig = field(default_factory=CheckpointProcessConfig)
    _: KW_ONLY
    replicated: Sequence[str] = ()
