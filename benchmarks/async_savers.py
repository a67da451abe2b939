"""The asynchronous ways to save that are compared, each configured for a machine without an accelerator.

Every saver writes into a directory of its own for each checkpoint. Only lastgood's is durable when its future is done;
:func:`wait_durable` adds to the others what they leave to their users: fsync of all files and directories.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from savers import fsync
from states import State, empty_copy

import lastgood

Tree = dict[str, Any]
Wait = Callable[[float], object]
"""Returns when it has happened; raises if it failed or takes more than so many seconds."""


@dataclass(frozen=True)
class Pending:
    """A save that goes on in the background."""

    wait_staged: Wait
    """Until training may change the state."""
    wait_written: Wait
    """Until the saver says that it has finished."""


class AsyncSaver:
    """One contender, ready for its first save once it is made."""

    fsyncs = False
    """Whether what is written is durable without further ado."""

    holds_steps = False
    """Whether optimizers wait for staging by themselves."""

    def save(self, path: str, tree: Tree) -> Pending:
        """Begin to save into a directory that does not exist."""
        raise NotImplementedError

    def prewarm(self, tree: Tree) -> None:
        """Prepare the memory for the first save, where there is a way to."""

    def load(self, path: str, like: State) -> Tree:
        """What a save has brought to disk; for a look at whether it is what was saved."""
        raise NotImplementedError

    def close(self) -> None:
        """End the processes and free the memory."""
        raise NotImplementedError


class LastgoodSaver(AsyncSaver):
    """As it comes."""

    fsyncs = True
    holds_steps = True

    def __init__(self) -> None:
        self._checkpointer = lastgood.make_async_checkpointer()
        self._checkpointer._checkpoint_process.process_creation_future.result()

    def save(self, path: str, tree: Tree) -> Pending:
        return _pending(*self._checkpointer.save(path, tree))

    def prewarm(self, tree: Tree) -> None:
        self._checkpointer.prewarm(tree).result()

    def load(self, path: str, like: State) -> Tree:
        return lastgood.load(os.path.join(path, "checkpoint_0.pt"))

    def close(self) -> None:
        self._checkpointer.close()


class ExperimentalSaver(AsyncSaver):
    """``torch.distributed.checkpoint._experimental``: staged by a thread into shared memory, which it keeps."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint._experimental.builder import make_async_checkpointer
        from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
        from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig

        staging = CheckpointStagerConfig(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
        )
        self._checkpointer = make_async_checkpointer(CheckpointerConfig(staging_config=staging))
        self._checkpointer._checkpoint_process.process_creation_future.result()

    def save(self, path: str, tree: Tree) -> Pending:
        return _pending(*self._checkpointer.save(path, tree))

    def load(self, path: str, like: State) -> Tree:
        return torch.load(os.path.join(path, "checkpoint_0.pt"), mmap=True, weights_only=True)

    def close(self) -> None:
        self._checkpointer.close()


class DcpProcessSaver(AsyncSaver):
    """``torch.distributed.checkpoint.async_save`` with a process, and a stager like the one above, kept over all saves.

    Its process group is one of a single rank. The process is started ahead; left to itself, the first save does so.
    """

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint import _async_process_executor as executor
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        hook = sys.excepthook
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        sys.excepthook = hook  # it has put a rank before every line of a traceback
        with _stderr_of_children_discarded():  # the process logs what it does
            executor._CHECKPOINT_PROCESS = executor._AsyncCheckpointProcess(executor._ProcessGroupInitInfo())
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            )
        )

    def save(self, path: str, tree: Tree) -> Pending:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        response = dcp.async_save(
            tree,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )
        return _pending(response.staging_completion, response.upload_completion)

    def load(self, path: str, like: State) -> Tree:
        import torch.distributed.checkpoint as dcp

        target = empty_copy(like).tree
        dcp.load(target, checkpoint_id=path)
        return target

    def close(self) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint import _async_process_executor as executor

        self._stager.close()
        executor._CHECKPOINT_PROCESS = None  # whose end is that of the process
        gc.collect()
        dist.destroy_process_group()


class TorchCheckpointingSaver(AsyncSaver):
    """The package ``torch-checkpointing``: one file for each item of the top level, without O_DIRECT.

    Its O_DIRECT writes are not aligned, which common file systems refuse.
    """

    def __init__(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._manager._saver._checkpoint_process.wait_for_init()

    def save(self, path: str, tree: Tree) -> Pending:
        written = self._manager.save(path, _as_items(tree))
        return Pending(self._wait_staged, written.result)

    def load(self, path: str, like: State) -> Tree:
        target = empty_copy(like).tree
        found = dict(self._manager.load(path, into=_as_items(target)))
        return found if found.keys() == target.keys() else found[_ONLY_ITEM]

    def close(self) -> None:
        self._manager.close()

    def _wait_staged(self, timeout: float) -> None:
        handle = self._manager.lock()
        if not handle.acquire(timeout=timeout):
            raise TimeoutError(f"not staged within {timeout:.0f} s")
        handle.release()


_ONLY_ITEM = "model"


def _as_items(tree: Tree) -> Tree:
    """A training state as it is; the names of tensors alone are no items."""
    return {_ONLY_ITEM: tree} if all(isinstance(value, torch.Tensor) for value in tree.values()) else tree


def _pending(staged: "Future[Any]", written: "Future[Any]") -> Pending:
    return Pending(staged.result, written.result)


@contextlib.contextmanager
def _stderr_of_children_discarded() -> Iterator[None]:
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


LASTGOOD = "lastgood.make_async_checkpointer"
EXPERIMENTAL = "torch _experimental async checkpointer"
DCP_PROCESS = "torch DCP async_save, process"
TORCH_CHECKPOINTING = "torch-checkpointing"

ASYNC_SAVERS: dict[str, Callable[[], AsyncSaver]] = {
    LASTGOOD: LastgoodSaver,
    EXPERIMENTAL: ExperimentalSaver,
    DCP_PROCESS: DcpProcessSaver,
    TORCH_CHECKPOINTING: TorchCheckpointingSaver,
}
PEERS = tuple(name for name in ASYNC_SAVERS if name != LASTGOOD)


def wait_durable(saver: AsyncSaver, pending: Pending, path: str, timeout: float) -> None:
    """Until what is under ``path`` would survive a power cut."""
    pending.wait_written(timeout)
    if saver.fsyncs:
        return
    for directory, _, files in os.walk(path):
        for name in files:
            fsync(os.path.join(directory, name))
        fsync(directory)
    fsync(os.path.dirname(path))
