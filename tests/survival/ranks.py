"""What the trainers of two ranks do when told to: one asynchronous checkpointer each, with a barrier in the child."""

import os
import threading
from multiprocessing.connection import Connection

from tests.distributed.barrier_ranks import store_arguments
from tests.helpers.disks import mount_small_disk
from tests.helpers.saves import state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.survival.traces import shared_memory
from tests.survival.trainers import ELEMENTS, process_of, stop_copying

from lastgood.barriers import BarrierConfig
from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.types import RankInfo

_this_process: list[AsyncCheckpointer] = []


def set_up(rank: int, port: int, timeout_secs: float) -> int:
    """The number of the checkpoint process, which has met that of the other rank."""
    arguments = store_arguments(rank, 2, port, timeout_secs=timeout_secs)
    config = CheckpointerConfig(barrier_config=BarrierConfig("tcp_store", arguments))
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS  # it imports torch, on a busy machine
    config.staging_config.snapshots_in_flight = 2
    _this_process[:] = [make_async_checkpointer(config, RankInfo(rank, 2))]
    return process_of(_this_process[0])


def save(path: str, number: int, elements: int = 50_000) -> None:
    _this_process[0].save(path, state_of(number, elements))[1].result(PATIENCE_SECS)


def save_where_nobody_else_comes(pipe: Connection, directory: str, number: int) -> None:
    """To a relative path, from a disk that only this process sees; first it says whether it has one, or why not."""
    problem = mount_small_disk(directory)
    pipe.send(problem or "saving")
    if problem is None:
        inside = os.path.join(directory, "inside")
        os.mkdir(inside)
        os.chdir(inside)
        save("step-1", number)


def stage(path: str, number: int) -> set[int]:
    """The shared memory that it is staged in."""
    _this_process[0].save(path, state_of(number))[0].result(PATIENCE_SECS)
    return set(shared_memory(os.getpid()))


def stage_half(pipe: Connection, path: str, number: int) -> None:
    stop_copying(1, lambda: pipe.send("half"))
    _this_process[0].save(path, state_of(number, ELEMENTS))
    threading.Event().wait()
