"""One life of a trainer and its checkpoint process, as the test sees it that ends it."""

import abc
import concurrent.futures
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.kills.places import order
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.process.processes import pipe
from tests.survival.traces import ProcessEnd, holders, mapped_shared_memory, shared_memory

TRAINER, PROCESS = "trainer", "checkpoint process"

_HEARD_LATELY = 20
"""How much of what was said is told with the moment when it was heard, if a sweep fails."""


class Stop(NamedTuple):
    """A place of one of the two, where it comes to a halt when it has come there so many times."""

    owner: str
    place: str
    times: int = 1

    def __str__(self) -> str:
        return f"{self.place} of the {self.owner}, number {self.times}"


class Life:
    """Starts a trainer, hears what it and its checkpoint process say, and kills them.

    ``train`` gets two pipes, one for each of them, the names of the files of their orders, which are in ``folder``,
    and ``arguments``.
    """

    def __init__(self, folder: Path, train: Callable[..., None], *arguments: Any) -> None:
        self.resumed: tuple[int, int] | None = None
        self.asked: dict[int, int] = {}
        """The number of the state of each step whose save was asked for."""
        self.staged: list[int] = []
        self.durable: list[int] = []
        self.failed: dict[int, str] = {}
        self.passed: list[Stop] = []
        self.stopped: str | None = None
        """Who stands still."""
        self.lost: str | None = None
        """Why the trainer could not go on with the other ranks."""
        self.closed = False
        self.news = 0
        self._began = time.monotonic()
        self._heard: deque[str] = deque(maxlen=_HEARD_LATELY)
        self._expected: str | None = None
        self._ended: list[Connection] = []
        self._processes: list[ProcessEnd] = []
        self._shared_memory: set[int] = set()
        self._held = ExitStack()
        (ours, trainers_end), (also_ours, processs_end) = (self._held.enter_context(pipe()) for _ in range(2))
        self._pipes = {TRAINER: ours, PROCESS: also_ours}
        self._orders = {TRAINER: folder / "orders.trainer", PROCESS: folder / "orders.process"}
        self._theirs = [trainers_end, processs_end]
        self._worker = Worker()
        self._held.callback(self._worker.kill)
        names = (str(self._orders[TRAINER]), str(self._orders[PROCESS]))
        self._train = partial(train, trainers_end, processs_end, names, *arguments)

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *error: object) -> None:
        # Whatever a failed test leaves: nobody goes on.
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
            self._held.enter_context(process)
        self._held.close()

    def start(self, stop: Stop | None = None) -> "Life":
        if stop is not None:
            self.order(stop)
        self._worker.start(self._train)
        return self

    def order(self, stop: Stop) -> None:
        """Have it stop there."""
        self._expected = stop.owner
        order(self._orders[stop.owner], stop.place, stop.times)

    def withdraw_order(self) -> None:
        """Whoever stops all the same goes on at once."""
        self._expected = None
        for file in self._orders.values():
            file.unlink(missing_ok=True)

    # Hearing

    def require(self, done: Callable[[], bool], what: str) -> None:
        require([self], done, what)

    @property
    def connections(self) -> list[Connection]:
        """Where something may come from."""
        every = [*self._pipes.values(), self._worker._pipe]
        return [connection for connection in every if connection not in self._ended]

    def hear(self, connection: Connection) -> None:
        """Take in what has come."""
        if connection is self._worker._pipe:
            self._ended.append(connection)
            if self.lost is None:
                self._worker.result()  # raises what has ended the training
                assert self.closed, f"the training is over; so far: {self}"
            return
        who = TRAINER if connection is self._pipes[TRAINER] else PROCESS
        try:
            words = connection.recv()
        except EOFError:
            self._ended.append(connection)
            if self.lost is None:
                raise
            return
        self.news += 1
        self._heard.append(f"{time.monotonic() - self._began:.1f} s {words}")
        for end in self._theirs:  # they have copies now
            end.close()
        match words:
            case ("process", pid):
                # One that has ended already is none to wait for.
                with suppress(ProcessLookupError):
                    self._processes.append(ProcessEnd(pid))
            case ("stopped", _):
                self.stopped = who
                if self._expected != who:
                    self.let_go_on()
                self._expected = None
            case ("passed", place, times):
                self.passed.append(Stop(who, place, times))
            case ("resumed", step, number):
                self.resumed = step, number
            case ("asked", step, number):
                self.asked[step] = number
            case ("staged", step):
                self.staged.append(step)
            case ("durable", step):
                self.durable.append(step)
            case ("failed", step, error):
                self.failed[step] = error
            case ("lost", error):
                self.lost = error
            case ("closed",):
                self.closed = True
            case _:
                raise AssertionError(words)

    @property
    def has_process(self) -> bool:
        return bool(self._processes)

    # Ending

    def kill(self, *victims: str) -> None:
        """SIGKILL, in this order."""
        self._note_shared_memory()
        for victim in victims:
            (self._worker if victim == TRAINER else self._processes[-1]).send_signal(signal.SIGKILL)
        if self.stopped in victims:
            self.stopped = None

    def let_go_on(self) -> None:
        """Whoever stands still goes on."""
        who, self.stopped = self.stopped, None
        if who is not None:
            self._pipes[who].send("go on")

    def _note_shared_memory(self) -> None:
        for pid in (self._worker.pid, *(process.pid for process in self._processes if not process.wait(0))):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                self._shared_memory |= shared_memory(pid).keys() | mapped_shared_memory(pid).keys()

    def tell_to_finish(self) -> None:
        """The trainer closes its manager when it comes to that."""
        self._pipes[TRAINER].send("finish")

    def exit(self) -> None:
        """The training is over: the trainer exits, or has done so if it could not go on with the others."""
        self._note_shared_memory()
        if self.lost is None:
            assert self._worker.exit() == 0
        else:
            self._worker._process.join(PATIENCE_SECS)
            assert self._worker._process.exitcode == 1

    def wait_for_ends(self) -> None:
        """Return when the trainer, which was killed or has exited, and all of its checkpoint processes are gone."""
        self._worker.kill()
        self._hear_rest(self._pipes[TRAINER])
        self._hear_rest(self._pipes[PROCESS])
        for process in self._processes:
            assert process.wait(), f"the checkpoint process {process.pid} does not end"
        # One that was just being started has not said a word, but has the memory that its output goes to. Looking
        # takes time: the next look finds what was started meanwhile.
        for _ in range(3):
            for pid in holders(self._shared_memory):
                with suppress(ProcessLookupError), ProcessEnd(pid) as starting:
                    assert starting.wait(), f"the checkpoint process {pid} does not end"
        left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in holders(self._shared_memory)}
        assert not left, f"these still hold the memory of {self._worker.pid}: {left}"

    def _hear_rest(self, connection: Connection) -> None:
        with suppress(EOFError, ConnectionResetError):
            while connection not in self._ended:
                assert connection.poll(PATIENCE_SECS), "somebody goes on after all should have ended"
                self.hear(connection)

    def __str__(self) -> str:
        return (
            f"resumed {self.resumed}, asked {self.asked}, staged {self.staged}, durable {self.durable}, "
            f"failed {self.failed}; lately: {'; '.join(self._heard)}"
        )


def hear_until(lives: Sequence[Life], done: Callable[[], bool], secs: float = PATIENCE_SECS) -> bool:
    """Take in what they say until that is so; whether it came to that in time."""
    deadline = time.monotonic() + secs
    while not done():
        left = deadline - time.monotonic()
        sources = {connection: life for life in lives for connection in life.connections}
        ready = [connection for connection in wait([*sources], max(0.0, left)) if isinstance(connection, Connection)]
        ends = [connection for connection in ready if connection is sources[connection]._worker._pipe]
        # The end of a training is heard after all that it has said before.
        for connection in [each for each in ready if each not in ends] or ends:
            sources[connection].hear(connection)
        if not ready and left <= 0:
            return False
    return True


def require(lives: Sequence[Life], done: Callable[[], bool], what: str) -> None:
    assert hear_until(lives, done), f"{what} does not come; so far: {'; '.join(map(str, lives))}"


class Sweep(abc.ABC):
    """Kills of one run, one after the other."""

    is_given_up = False
    """Another one has failed, and this one need not go on."""

    def __init__(self, folder: Path, seed: str) -> None:
        folder.mkdir()
        self._folder = folder
        self._seed = seed
        self.missed: list[Stop] = []
        """Where nobody came by in that life: it was ended some time later."""

    @abc.abstractmethod
    def go(self) -> None:
        """Carry them out; looks before each whether it is given up."""


def side_by_side(sweeps: Sequence[Sweep]) -> None:
    """All of them at the same time; raises what one raises."""
    with ThreadPoolExecutor(len(sweeps)) as threads:
        futures = [threads.submit(sweep.go) for sweep in sweeps]
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for sweep in sweeps:
            sweep.is_given_up = True
    for future in futures:
        future.result()
