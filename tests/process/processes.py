"""Checkpoint processes for tests, and snapshots whose staging ends when the test says so."""

import contextlib
import multiprocessing
import os
import select
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child

from lastgood._snapshot import Snapshot
from lastgood.checkpoint_process import CheckpointProcess, CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.staging import CheckpointStagerConfig, DefaultStager
from lastgood.types import RankInfo

STANDARD = {"config": CheckpointWriterConfig()}


def new_process(
    writer: Callable[..., Any] = CheckpointWriter,
    arguments: dict[str, Any] | None = None,
    *,
    init: Callable[..., Any] = in_child.nothing,
    init_arguments: tuple[Any, ...] = (),
    rank_info: RankInfo | None = None,
    **config: Any,
) -> CheckpointProcess:
    if arguments is None:
        arguments = STANDARD if writer is CheckpointWriter else {}
    rank_info = RankInfo(0, 1) if rank_info is None else rank_info
    # Tests with short time-outs must not lose them to whatever else the machine is doing.
    config = {"nice": 0, **config}
    return CheckpointProcess(rank_info, CheckpointProcessConfig(**config), init, init_arguments, writer, arguments)


@contextlib.contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[CheckpointProcess]:
    process = new_process(*arguments, **options)
    try:
        process.process_creation_future.result(PATIENCE_SECS)
        yield process
    finally:
        process.close()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        yield ours, theirs


def receive(connection: Connection) -> Any:
    assert connection.poll(PATIENCE_SECS), "the other process says nothing"
    return connection.recv()


def pid_of(process: CheckpointProcess) -> int:
    assert process.process is not None
    return process.process.processes[0].pid


class Ends:
    """Waits for the end of a process that may be anybody's child."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)

    def wait(self, secs: float = PATIENCE_SECS) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        try:
            return bool(poller.poll(secs * 1000))
        finally:
            os.close(self._pidfd)


class HeldSnapshot:
    """A real snapshot of ``state``, of which others learn as the test says."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._stager = DefaultStager(CheckpointStagerConfig(use_async_staging=False))
        self._real = self._stager.snapshot(state)
        self.given_back: list[bool] = []
        self.snapshot = Snapshot(self.given_back.append)

    def place(self) -> "HeldSnapshot":
        self.snapshot.placed.set_result(self._real.placed.result(0))
        return self

    def advance(self, staged: int) -> None:
        self.snapshot.report_progress(staged)

    def complete(self) -> "HeldSnapshot":
        self.snapshot.report_end(None)
        return self

    def fail(self, error: BaseException) -> None:
        self.snapshot.report_end(error)

    def close(self) -> None:
        self._real.release()
        self._stager.close()


@contextlib.contextmanager
def held(state: dict[str, Any]) -> Iterator[HeldSnapshot]:
    snapshot = HeldSnapshot(state)
    try:
        yield snapshot
    finally:
        snapshot.close()
