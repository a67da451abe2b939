"""Trainers that die: what runs in processes that the tests fork from a server which has torch loaded."""

import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.helpers.disks import elements_of, mount_small_disk
from tests.helpers.saves import read, state_of
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.process import in_child
from tests.survival.traces import shared_memory

from lastgood._staging import job
from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import StorageError

ELEMENTS = 4_000_000
"""16 MB, so that there is something to be interrupted."""

_LARGE = 1 << 20


class Told(NamedTuple):
    """What a trainer says of itself when its test is to go on."""

    checkpoint_process: int
    shared_memory: set[int]
    others: list[int]


@contextmanager
def trainer(function: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Worker]:
    """A process that runs ``function(pipe, *arguments, **options)``; what it sends is what the worker receives."""
    worker = Worker()
    try:
        worker.start(partial(function, **options), *arguments, with_pipe=True)
        yield worker
    finally:
        worker.kill()


def process_of(checkpointer: AsyncCheckpointer) -> int:
    """The number of its checkpoint process."""
    checkpointer._checkpoint_process.process_creation_future.result(PATIENCE_SECS)
    assert checkpointer._checkpoint_process.process is not None
    return checkpointer._checkpoint_process.process.processes[0].pid


def _about(checkpointer: AsyncCheckpointer, others: list[int] | None = None) -> Told:
    # Not process_of(): the process may not be ready yet.
    link = checkpointer._checkpoint_process._links[-1]
    handle = link.wait_until_started(PATIENCE_SECS)
    assert handle is not None
    return Told(handle.processes[0].pid, set(shared_memory(os.getpid())), others or [])


def train_until_killed(state: dict[str, Any]) -> None:
    """Change the tensors, as training does; then wait, so as not to take the processor from whoever is observed."""
    for _ in range(3):
        state["model"]["weights"].add_(1)
    threading.Event().wait()


def save_and_train(
    pipe: Connection,
    path: str,
    earlier: int | None,
    number: int,
    *,
    own_group: bool = False,
    loaders: bool = False,
    may_leave: Connection | None = None,
) -> None:
    """Save, say so once the stage future has resolved, and train on; or leave at once, when that is allowed."""
    if own_group:
        os.setpgid(0, 0)
    checkpointer = make_async_checkpointer()
    if earlier is not None:
        checkpointer.save(path, state_of(earlier, ELEMENTS))[1].result(PATIENCE_SECS)
    state = state_of(number, ELEMENTS)
    loader = None
    if loaders:
        process_of(checkpointer)  # so that there is a pipe to inherit
        loader = _DataLoader()
    staged, _ = checkpointer.save(path, state)
    assert staged.result(PATIENCE_SECS) is None
    pipe.send(_about(checkpointer, [] if loader is None else loader.pids))
    if may_leave is not None:
        may_leave.recv()
        os._exit(3)
    train_until_killed(state)


class _DataLoader:
    """With workers that have been forked from the trainer, its descriptors and its shared memory."""

    def __init__(self) -> None:
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        data = torch.utils.data.TensorDataset(torch.zeros(100_000, 1))
        loader = torch.utils.data.DataLoader(
            data, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
        )
        self._batches = iter(loader)
        next(self._batches)
        self.pids = [worker.pid for worker in self._batches._workers]  # type: ignore[attr-defined]


def save_at_any_time(pipe: Connection, path: str, number: int) -> None:
    """Say so before the call to ``save``."""
    checkpointer = make_async_checkpointer()
    checkpointer.save(path, state_of(number, ELEMENTS))[1].result(PATIENCE_SECS)
    state = state_of(number + 1, ELEMENTS)
    pipe.send(_about(checkpointer))
    staged, _ = checkpointer.save(path, state)
    staged.result(PATIENCE_SECS)
    train_until_killed(state)


def stop_copying(pieces: int, then: Callable[[], None]) -> None:
    """From now on staging stops for ever after so many pieces of large tensors."""
    real, left = job.copy_memory, pieces

    def copy(target: int, source: int, size: int) -> None:
        nonlocal left
        if size >= _LARGE:
            if not left:
                then()
                threading.Event().wait()
            left -= 1
        real(target, source, size)

    job.copy_memory = copy
    job.COPY_THREADS = 1


def save_halfway(pipe: Connection, path: str, number: int, pieces: int) -> None:
    """Staging stops in the middle; the pieces before are being written."""
    checkpointer = make_async_checkpointer()
    process_of(checkpointer)
    stop_copying(pieces, lambda: pipe.send(_about(checkpointer)))
    staged, _ = checkpointer.save(path, state_of(number, ELEMENTS))
    staged.result(PATIENCE_SECS)


def save_gated(pipe: Connection, gate: Connection, path: str, number: int) -> None:
    """Staged, and durable under a temporary name: what follows is for the test to allow."""
    checkpointer = make_async_checkpointer(
        checkpoint_writer_init_fn=in_child.gated_writer, checkpoint_writer_init_args={"pipe": gate}
    )
    staged, _ = checkpointer.save(path, state_of(number))
    staged.result(PATIENCE_SECS)
    pipe.send(_about(checkpointer))
    threading.Event().wait()


def save_to_full_disk(directory: str) -> dict[str, Any]:
    """6 of 16 MiB are taken by a checkpoint, which one of 12 MiB is to replace."""
    return _save_on_small_disk(directory, 12, lambda: None, lambda: None)


def save_to_read_only_disk(directory: str) -> dict[str, Any]:
    """It becomes so after the first checkpoint."""

    def remount(option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", directory], check=True, timeout=60)

    return _save_on_small_disk(directory, 6, lambda: remount("ro"), lambda: remount("rw"))


def _save_on_small_disk(
    directory: str, mib: int, spoil: Callable[[], None], repair: Callable[[], None]
) -> dict[str, Any]:
    skip = mount_small_disk(directory)
    if skip is not None:
        return {"skip": skip}
    path = f"{directory}/checkpoint"
    checkpointer = make_async_checkpointer()
    checkpointer.save(path, state_of(1, elements_of(6)))[1].result(PATIENCE_SECS)
    first = process_of(checkpointer)
    spoil()
    _, written = checkpointer.save(path, state_of(2, elements_of(mib)))
    wait([written], PATIENCE_SECS)
    seen: dict[str, Any] = {}
    try:
        checkpointer.save(path, state_of(3, elements_of(6)))
    except StorageError as error:
        seen["raised by the next"] = error
    seen["meanwhile"] = os.listdir(path), read(path)["step"]
    repair()
    checkpointer.save(path, state_of(4, elements_of(6)))[1].result(PATIENCE_SECS)
    seen["is the same process"] = process_of(checkpointer) == first
    checkpointer.close()
    seen["in the end"] = os.listdir(path), read(path)["step"]
    return seen


def file_in(path: Path) -> Path:
    return path / "checkpoint_0.pt"
