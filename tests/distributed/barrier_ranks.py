"""Ranks that meet at barriers: as threads of the test's process, and as processes that can be killed."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from lastgood.barriers import DistBarrier, TCPStoreBarrier

HOST = "127.0.0.1"
# How long a test waits for what ought to happen at once: only a failing test ever waits so long.
PATIENCE_SECS = 40.0


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system chose and gives to nobody else, but on which a store may still listen."""
    family, anywhere = (socket.AF_INET6, "::") if socket.has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family) as reservation:
        # Bound but not listening: another socket with this option may bind, and then listen on, the same port.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((anywhere, 0))
        yield reservation.getsockname()[1]


def store_arguments(rank: int, world_size: int, port: int, **changed: Any) -> dict[str, Any]:
    """Arguments of a TCPStoreBarrier with time-outs so long that only a failing test sees them pass."""
    arguments = {
        "global_rank": rank,
        "global_world_size": world_size,
        "barrier_prefix": "save",
        "timeout_barrier_init_secs": 60,
        "use_checkpoint_barrier_tcpstore_libuv": True,
        "tcpstore_port": port,
        "master_address": HOST,
        "timeout_secs": 600,
    }
    return arguments | changed


def start(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run the function in a daemon thread: a barrier that hangs fails its test, and not the end of the run."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def finished(futures: list[Future[Any]]) -> list[BaseException | None]:
    """How each call ended, once all have."""
    _, hanging = wait(futures, timeout=PATIENCE_SECS)
    assert not hanging, f"{len(hanging)} of {len(futures)} ranks hang"
    return [future.exception() for future in futures]


def make_together(arguments: list[dict[str, Any]]) -> list[TCPStoreBarrier]:
    """The barriers of several ranks in this process; each waits for the others while it is made."""
    makings = [start(lambda given=given: TCPStoreBarrier(**given)) for given in arguments]
    return [making.result(timeout=PATIENCE_SECS) for making in makings]


def meet(barriers: list[TCPStoreBarrier]) -> list[BaseException | None]:
    """Let these ranks execute their barrier, all at the same time."""
    return finished([start(barrier.execute_barrier) for barrier in barriers])


def serve_rank(commands: Connection, make_barrier: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The life of a rank in its own process: it says ``ready``, then executes its barrier at every command."""
    barrier = make_barrier(**arguments)
    commands.send("ready")
    try:
        while commands.recv() == "meet":
            try:
                barrier.execute_barrier()
                commands.send("met")
            except Exception as error:
                commands.send(error)
    except KeyboardInterrupt:
        commands.send("interrupted")


def make_dist_barrier(rank: int, world_size: int, rendezvous: str) -> DistBarrier:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    return DistBarrier()
