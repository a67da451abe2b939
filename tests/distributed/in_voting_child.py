"""What runs in the checkpoint processes of ranks that vote: their writer, and what goes wrong at a given place."""

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lastgood._coordination.calls import Coordination
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.storage.file_ops import OsFileOps
from lastgood.types import RankInfo

PATHS = {"open_exclusive": 0, "replace": 1, "link": 1, "rename_without_replacing": 1}
"""Which argument of an operation is the path that it is about; others are about what is open."""


def do_at(orders: str) -> None:
    """Once somebody has written an order to the file ``orders``, do it at the place that it names.

    An order has a verb ("kill", "kill after" or "fail"), the name of a file operation and a part of a path.
    """
    for name in (*PATHS, "pwrite"):
        setattr(OsFileOps, name, _watched(name, getattr(OsFileOps, name), Path(orders)))


def _watched(name: str, real: Callable[..., Any], orders: Path) -> Callable[..., Any]:
    def operation(self: OsFileOps, *arguments: Any) -> Any:
        verb = _verb_at(name, arguments, orders)
        if verb == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "fail":
            raise OSError(28, "No space left on device")
        result = real(self, *arguments)
        if verb == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return operation


def _verb_at(name: str, arguments: tuple[Any, ...], orders: Path) -> str | None:
    if not orders.exists():
        return None
    verb, operation, part = orders.read_text().split("|")
    about = arguments[PATHS[name]] if name in PATHS else os.readlink(f"/proc/self/fd/{arguments[0]}")
    if operation != name or part not in str(about):
        return None
    orders.unlink()
    return verb


class Gate(WriterHook):
    """Saves that ask for it fail ("no"), or say where they are and go on when they are told to ("wait")."""

    def __init__(self, pipe: Connection | None) -> None:
        self._pipe = pipe

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        wish = kwargs.get("wish")
        if wish == "no":
            raise ValueError("this rank's hook says no")
        if wish == "wait" and self._pipe is not None:
            self._pipe.send(("pre_commit", path, sorted(kwargs)))
            self._pipe.recv()

    def post_commit(self, path: str, **kwargs: Any) -> None:
        pass


def make_writer(
    config: CheckpointWriterConfig,
    rank_info: RankInfo,
    coordination: Coordination | None,
    pipe: Connection | None = None,
) -> CheckpointWriter:
    return CheckpointWriter(config, rank_info, None, Gate(pipe), coordination=coordination)
