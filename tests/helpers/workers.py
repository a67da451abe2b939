"""Processes that do what a test tells them, and may be killed.

All are forked from one server that has imported torch already: the first costs seconds, each other one milliseconds.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# pytest too: each process imports what the main module imports.
PRELOADED = [
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "lastgood.builder",
    "lastgood._single_file",
    "pytest",
    "tests.helpers.saves",
]

PATIENCE_SECS = 60.0
"""How long a test waits for what ought to happen at once: only a failing test ever waits so long."""


class Worker:
    """A process that calls what it is told to; a function called ``with_pipe`` gets the pipe before its arguments."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        # The fork server waits for its children: their numbers may be another's as soon as they have ended.
        self._pidfd = os.pidfd_open(self.pid)
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, function: Callable[..., Any], *arguments: Any, with_pipe: bool = False) -> None:
        """Begin a call; :meth:`result` waits for its end."""
        self._pipe.send((function, arguments, with_pipe))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.start(function, *arguments)
        return self.result()

    def receive(self) -> Any:
        """What a function that was given the pipe sends, or ``(outcome, value)`` at its end."""
        assert self._pipe.poll(PATIENCE_SECS), "the process says nothing"
        return self._pipe.recv()

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        outcome, value = self.receive()
        if outcome == "raised":
            raise value
        assert outcome == "returned", outcome
        return value

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process.is_alive():
            self.send_signal(signal.SIGKILL)
        self._process.join(PATIENCE_SECS)
        self._pipe.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def send_signal(self, number: int) -> None:
        """To this process alone: where it has ended, to none."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def exit(self) -> int | None:
        """Let the process come to its own end, and return its exit status."""
        self._pipe.send(None)
        self._process.join(PATIENCE_SECS)
        return self._process.exitcode


class Together:
    """Processes that do the same things at the same time."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returns on each of them; raises the first error once all have ended."""
        for worker in self.workers:
            worker.start(function, *arguments)
        return self.results()

    def results(self) -> list[Any]:
        """Those of what all were told to do, once all have ended, so that nobody's is left for later."""
        results, errors = [], []
        for rank, worker in enumerate(self.workers):
            try:
                results.append(worker.result())
            except Exception as error:
                error.add_note(f"on rank {rank} of {len(self.workers)}")
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def kill(self) -> None:
        """End them."""
        for worker in self.workers:
            worker.kill()


def _serve(pipe: Connection) -> None:
    while (job := pipe.recv()) is not None:
        function, arguments, with_pipe = job
        try:
            value = function(pipe, *arguments) if with_pipe else function(*arguments)
            pipe.send(("returned", value))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(("raised", error))
