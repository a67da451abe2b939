"""What runs in checkpoint processes that tests start. torch is imported by what needs it: most must do without."""

import os
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.errors import StorageError
from lastgood.types import RankInfo


def nothing() -> None:
    pass


def import_torch() -> None:
    """Ahead of the writes, for tests whose time-outs are shorter than that may take."""
    import torch

    assert torch


def fail_to_start(reason: str) -> None:
    raise LookupError(reason)


def exit_at_once(status: int) -> None:
    print("about to exit", flush=True)
    os._exit(status)


def start_never() -> None:
    threading.Event().wait()


def note_start(file: str) -> None:
    Path(file).write_text(f"{os.getppid()} {os.getsid(0)} {os.environ.get('PYTHONPATH')} {os.getcwd()}")


class Gate(WriterHook):
    """Says where it has come to, and goes on when it is told to: "fail" makes the write fail, "exit" the process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self._pass(("pre_commit", path, kwargs))

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self._pass(("post_commit", path, kwargs))

    def _pass(self, place: Any) -> None:
        self._pipe.send(place)
        try:
            order = self._pipe.recv()
        except EOFError:  # nobody is there any more
            return
        if order == "fail":
            raise StorageError("the disk is full of bees", errno=28, path=place[1], rank=3, phase="write")
        if order == "say":
            print("a word from the hook", file=sys.stderr, flush=True)
        if order == "fail untyped":

            class Local(Exception):
                pass

            raise Local("nobody else knows this class")
        if order == "torch?":
            self._pipe.send("torch" in sys.modules)


class Noting(WriterHook):
    """Sends what it is called with."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self._pipe.send(("pre_commit", path, kwargs))

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self._pipe.send(("post_commit", path, kwargs))


def gated_writer(rank_info: RankInfo, pipe: Connection) -> CheckpointWriter:
    return CheckpointWriter(CheckpointWriterConfig(), rank_info, None, Gate(pipe))


def noting_writer(
    pipe: Connection, rank_info: RankInfo, config: CheckpointWriterConfig, **more: Any
) -> CheckpointWriter:
    pipe.send((rank_info, config, more))
    return CheckpointWriter(config, rank_info, None, Noting(pipe))


class StateFirst:
    """A writer of the user's own, with the arguments in the other order; it knows nothing of lastgood."""

    def __init__(self, pipe: Connection | None = None, *, in_background: bool = False) -> None:
        self._pipe = pipe
        self._in_background = in_background

    def write(self, state_dict: dict[str, Any], path: str, **kwargs: Any) -> "Future[None] | None":
        import torch

        if self._pipe is not None:
            self._pipe.send(("writing", path))
            self._pipe.recv()
        Path(path).mkdir(parents=True, exist_ok=True)
        torch.save({"state": state_dict, "kwargs": kwargs}, f"{path}/custom.pt")
        if not self._in_background:
            return None
        future: Future[None] = Future()
        threading.Timer(0.05, future.set_result, [None]).start()
        return future


class PathFirst(CheckpointWriter):
    def __init__(self) -> None:
        pass

    def write(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> None:
        StateFirst().write(state_dict, path, **kwargs)


class ChangesTensors:
    """Adds 1 to every tensor that it is given under "shared", where it stands."""

    def write(self, path: str, state_dict: dict[str, Any]) -> None:
        state_dict["shared"]["weights"].add_(1)
        state_dict["listed"][1].add_(1)
        state_dict["private"].add_(1)


class Hangs:
    """Stops getting on in the middle of a write."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def write(self, path: str, state_dict: dict[str, Any]) -> None:
        self._pipe.send(os.getpid())
        threading.Event().wait()


class Busy:
    """Takes longer than the time-out for what makes no progress, but gets on all the while."""

    def __init__(self, secs: float) -> None:
        self._secs = secs

    def write(self, path: str, state_dict: dict[str, Any]) -> None:
        import time

        end = time.monotonic() + self._secs
        while time.monotonic() < end:
            sum(range(1000))
        Path(path).mkdir()


def leaves_a_thread_behind(rank_info: RankInfo) -> CheckpointWriter:
    """A process with this thread does not end by itself."""
    threading.Thread(target=threading.Event().wait).start()
    return CheckpointWriter(CheckpointWriterConfig(), rank_info)
