"""What the processes of several ranks do when told to: one checkpointer each, with a real barrier."""

from multiprocessing.connection import Connection
from typing import Any

from tests.crash.stopping import Stop, StoppingHook
from tests.distributed.barrier_ranks import store_arguments
from tests.helpers.saves import state_of

from lastgood.barriers import BarrierConfig
from lastgood.builder import make_sync_checkpointer
from lastgood.checkpoint_writer import WriterHook
from lastgood.checkpointer import SyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.types import RankInfo

_this_process: list[SyncCheckpointer] = []


class Refuses(WriterHook):
    """Fails the saves that are asked to fail."""

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        if kwargs.get("fail"):
            raise ValueError("this rank's hook says no")

    def post_commit(self, path: str, **kwargs: Any) -> None:
        pass


def set_up(rank: int, world_size: int, port: int, timeout_secs: float) -> None:
    arguments = store_arguments(rank, world_size, port, timeout_secs=timeout_secs)
    config = CheckpointerConfig(barrier_config=BarrierConfig("tcp_store", arguments))
    _this_process[:] = [make_sync_checkpointer(config, RankInfo(rank, world_size), Refuses())]


def save(path: str, number: int, **kwargs: Any) -> None:
    _this_process[0].save(path, state_of(number), **kwargs)


def save_and_fail(path: str, number: int) -> None:
    save(path, number, fail=True)


def load(path: str) -> Any:
    return _this_process[0].load(path)


def save_until_pre_commit(pipe: Connection, path: str, number: int) -> None:
    """This rank's bytes are durable; it says so, and never goes on."""
    writer = _this_process[0]._writer
    writer._commit_hook = StoppingHook(Stop(pipe, 0))
    save(path, number)
