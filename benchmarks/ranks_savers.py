"""The ways to save and load the parts of several ranks that are compared, each with the default process group.

DCP is :mod:`torch.distributed.checkpoint`. Its ``FileSystemWriter`` syncs each file (``sync_files``, its default), but
no directory: :func:`wait_durable` does that for it. Savers that are none of an asynchronous kind have finished when
``save`` returns.
"""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from async_savers import AsyncSaver, LastgoodSaver, Pending, Tree
from savers import fsync
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import _async_process_executor as executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import lastgood

GROUP_TIMEOUT = timedelta(seconds=120)


class LastgoodSyncSaver(AsyncSaver):
    """As it comes."""

    fsyncs = True

    def __init__(self) -> None:
        self._checkpointer = lastgood.make_sync_checkpointer()

    def save(self, path: str, tree: Tree) -> Pending:
        self._checkpointer.save(path, tree)
        return _FINISHED

    def close(self) -> None:
        self._checkpointer.close()


class DcpSaver(AsyncSaver):
    """``save`` with so many threads on each rank; the default is one."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def save(self, path: str, tree: Tree) -> Pending:
        dcp.save(tree, storage_writer=FileSystemWriter(path, thread_count=self._threads))
        return _FINISHED

    def close(self) -> None:
        pass


class _DcpAsyncSaver(AsyncSaver):
    """``async_save`` with a stager that works in a thread and is kept over all saves. (By default each save makes a new
    one, which stages before ``async_save`` returns.)"""

    def __init__(self, kind: AsyncCheckpointerType, *, shared_memory: bool) -> None:
        self._kind = kind
        self._group: Any = None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=shared_memory,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )

    def save(self, path: str, tree: Tree) -> Pending:
        response = dcp.async_save(
            tree,
            storage_writer=FileSystemWriter(path),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        return Pending(response.staging_completion.result, response.upload_completion.result)

    def close(self) -> None:
        self._stager.close()


class DcpThreadSaver(_DcpAsyncSaver):
    """Written by a thread of the training process, with a process group of its own for it."""

    def __init__(self) -> None:
        super().__init__(AsyncCheckpointerType.THREAD, shared_memory=False)
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)

    def close(self) -> None:
        super().close()
        dist.destroy_process_group(self._group)


class DcpProcessSaver(_DcpAsyncSaver):
    """Written by a process of its own, started ahead; left to itself, the first save does so."""

    def __init__(self) -> None:
        super().__init__(AsyncCheckpointerType.PROCESS, shared_memory=True)
        executor._CHECKPOINT_PROCESS = executor._AsyncCheckpointProcess(executor._ProcessGroupInitInfo())

    def close(self) -> None:
        super().close()
        executor._CHECKPOINT_PROCESS = None  # whose end is that of the process
        gc.collect()


_FINISHED = Pending(lambda timeout: None, lambda timeout: None)

LASTGOOD = "lastgood.make_sync_checkpointer"
LASTGOOD_ASYNC = "lastgood.make_async_checkpointer"
DCP = "DCP save"
DCP_THREADS = "DCP save, 2 threads"
DCP_ASYNC_THREAD = "DCP async_save, thread"
DCP_ASYNC_PROCESS = "DCP async_save, process"

SAVERS: dict[str, Callable[[], AsyncSaver]] = {
    LASTGOOD: LastgoodSyncSaver,
    DCP: partial(DcpSaver, 1),
    DCP_THREADS: partial(DcpSaver, 2),
    LASTGOOD_ASYNC: LastgoodSaver,
    DCP_ASYNC_THREAD: DcpThreadSaver,
    DCP_ASYNC_PROCESS: DcpProcessSaver,
}
OURS = (LASTGOOD, LASTGOOD_ASYNC)
DCP_SYNC_SAVERS = (DCP, DCP_THREADS)
DCP_ASYNC_SAVERS = (DCP_ASYNC_THREAD, DCP_ASYNC_PROCESS)


def wait_durable(saver: AsyncSaver, pending: Pending, path: str, timeout: float) -> None:
    """Until the rank has done what it has to for the checkpoint to survive a power cut."""
    pending.wait_written(timeout)
    if not saver.fsyncs and dist.get_rank() == 0:
        fsync(path)
        fsync(os.path.dirname(path))


def load_with_lastgood(path: str, tree: Tree) -> None:
    """In place; everything that is read is checked."""
    rank_info = lastgood.RankInfo(dist.get_rank(), dist.get_world_size())
    _, missing = lastgood.CheckpointReader(rank_info).read(path, tree)
    if missing:
        raise ValueError(f"missing: {missing}")


def load_with_dcp(path: str, tree: Tree) -> None:
    """In place; nothing is checked."""
    dcp.load(tree, checkpoint_id=path)


LASTGOOD_LOAD = "lastgood"
DCP_LOAD = "DCP"
LOADERS: dict[str, Callable[[str, Tree], None]] = {LASTGOOD_LOAD: load_with_lastgood, DCP_LOAD: load_with_dcp}
"""By name: how to load what either has saved."""

LOADER_OF = {name: LASTGOOD_LOAD if name in OURS else DCP_LOAD for name in SAVERS}
