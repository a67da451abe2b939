"""Where the parts are put together."""

import torch.distributed

from lastgood.barriers import create_barrier_from_config
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter, WriterHook
from lastgood.checkpointer import SyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.types import RankInfo


def make_sync_checkpointer(
    config: CheckpointerConfig | None = None,
    rank_info: RankInfo | None = None,
    commit_hook: WriterHook | None = None,
) -> SyncCheckpointer:
    """A checkpointer that saves before it returns.

    Without ``rank_info``, the rank and world size of the default process group, or a single rank if there is none.
    Several ranks without a configured barrier write independent files: each is atomic by itself.
    """
    config = CheckpointerConfig() if config is None else config
    rank_info = _current_rank_info() if rank_info is None else rank_info
    barrier = create_barrier_from_config(config.barrier_config)
    writer = CheckpointWriter(config.writer_config, rank_info, barrier, commit_hook)
    return SyncCheckpointer(writer, CheckpointReader(rank_info))


def _current_rank_info() -> RankInfo:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return RankInfo(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return RankInfo(0, 1)
