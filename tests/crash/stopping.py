"""A save that stops at a chosen place, says so, and waits to be killed: what runs in the process that dies."""

import threading
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.saves import NotingBarrier, state_of

import lastgood
from lastgood.barriers import Barrier
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.storage.file_ops import OsFileOps
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo


class Stop:
    """Counts places; at the chosen one it says its name and never goes on."""

    def __init__(self, pipe: Connection | None, place: int) -> None:
        self.names: list[str] = []
        self._pipe = pipe
        self._place = place
        self._lock = threading.Lock()

    def pass_by(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            stopped = len(self.names) - 1 == self._place
        if stopped and self._pipe is not None:
            self._pipe.send(("stopped at", name))
            threading.Event().wait()


class StoppingFileOps:
    """The real operations; before each there is a place to stop."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._real = OsFileOps()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            self._stop.pass_by(name)
            return real(*arguments, **options)

        return operation


class StoppingHook(WriterHook):
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self._stop.pass_by("pre_commit")

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self._stop.pass_by("post_commit")


class StoppingBarrier(Barrier):
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def execute_barrier(self) -> None:
        self._stop.pass_by("barrier")


def save_checkpoint(pipe: Connection | None, path: str, number: int, place: int, world_size: int = 1) -> list[str]:
    """Rank 0's save, with a place to stop at before every operation, in the hooks and at the barrier; all places."""
    stop = Stop(pipe, place)
    storage = LocalStorage(StoppingFileOps(stop))  # type: ignore[arg-type]
    writer = CheckpointWriter(
        CheckpointWriterConfig(), RankInfo(0, world_size), StoppingBarrier(stop), StoppingHook(stop), storage=storage
    )
    writer.write(path, state_of(number))
    stop.pass_by("saved")
    return stop.names


def save_file(pipe: Connection | None, path: str, number: int, place: int) -> list[str]:
    """The same for ``lastgood.save``."""
    stop = Stop(pipe, place)
    real = {name: getattr(OsFileOps, name) for name in vars(OsFileOps) if not name.startswith("_")}

    def stopping(name: str) -> Any:
        def operation(self: OsFileOps, *arguments: Any, **options: Any) -> Any:
            stop.pass_by(name)
            return real[name](self, *arguments, **options)

        return operation

    for name in real:
        setattr(OsFileOps, name, stopping(name))
    try:
        lastgood.save(state_of(number), path)
    finally:
        for name, function in real.items():
            setattr(OsFileOps, name, function)
    stop.pass_by("saved")
    return stop.names


def leave_rank_1s_file(path: str, number: int) -> None:
    """Rank 1 of two publishes its file, and then dies at the barrier."""

    class Dies(NotingBarrier):
        def execute_barrier(self) -> None:
            raise InterruptedError

    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(1, 2), Dies())
    try:
        writer.write(path, state_of(number))
    except InterruptedError:
        return
