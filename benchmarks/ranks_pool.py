"""Processes that are the ranks of one process group, and stay so over all measurements."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import process_tree

_WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ranks_worker.py")
_SECONDS_TO_LEAVE = 20.0


class RankError(RuntimeError):
    """What was asked of the ranks failed on one of them; they are there for the next."""


class RanksLostError(Exception):
    """A rank has ended or does not answer: nothing more can be measured with them."""


class RankPool:
    """As many processes as there are ranks; each does what it is asked, at the same time as the others.

    They are programs of their own, as under torchrun. What they print to standard error is kept for error messages.
    """

    def __init__(self, world_size: int, directory: str, timeout: float) -> None:
        self._timeout = timeout
        self._others = process_tree.descendants()
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors = [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115 (closed below)
        environment = _environment(world_size)
        rendezvous = os.path.abspath(os.path.join(directory, f"rendezvous-{world_size}"))
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            command = [sys.executable, _WORKER, str(theirs.fileno()), str(rank), str(world_size), rendezvous]
            self._processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=self._errors[rank], env=environment)
            )
            theirs.close()
            self._connections.append(ours)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank. :class:`RankError` brings the first failure."""
        for rank, connection in enumerate(self._connections):
            try:
                connection.send((function, arguments))
            except OSError as error:
                raise self._lost(rank) from error
        deadline = time.monotonic() + self._timeout
        answers = [self._answer(rank, deadline) for rank in range(len(self._connections))]
        for rank, (fine, answer) in enumerate(answers):
            if not fine:
                raise RankError(f"rank {rank}: {answer}")
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes, and all that they have started."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        process_tree.kill(process_tree.descendants() - self._others)
        for process in self._processes:
            process.kill()
            process.wait()
        for closable in (*self._connections, *self._errors):
            closable.close()

    def _answer(self, rank: int, deadline: float) -> tuple[bool, Any]:
        connection = self._connections[rank]
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                answer: tuple[bool, Any] = connection.recv()
                return answer
        except (EOFError, OSError) as error:
            raise self._lost(rank) from error
        raise RanksLostError(f"rank {rank} did not answer within {self._timeout:.0f} s")

    def _lost(self, rank: int) -> RanksLostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(1)
        self._errors[rank].seek(0)
        text = self._errors[rank].read().decode(errors="replace").strip()
        return RanksLostError(f"rank {rank} has ended (status {self._processes[rank].poll()}): {text[-2000:]}")


def _environment(world_size: int) -> dict[str, str]:
    """As torchrun has it: one thread for each rank, all of this machine. DCP's processes meet at the address."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(world_size)}
