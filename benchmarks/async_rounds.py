"""Asynchronous saves in turns: first ones by savers made anew, then later ones by savers that stay."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import process_tree
from async_savers import LASTGOOD, AsyncSaver, wait_durable
from states import State, require_same
from timing import Contender, Samples, progress, reason, settle


@dataclass(frozen=True)
class AsyncRounds:
    """How many of each kind, how long one save may take, and what is done about memory before each."""

    first: int
    later: int
    timeout: float
    touched_bytes: int


@dataclass(frozen=True)
class Laps:
    """Seconds from the call of one save, and the processor time of all processes until it was durable."""

    returned: float
    staged: float
    durable: float
    cpu: float


@dataclass(frozen=True)
class Entry:
    """A contender; several lines of the tables can be first saves of the same one."""

    saver: str
    make: Callable[[], AsyncSaver]
    first_name: str
    prewarm: bool = False


@dataclass
class AsyncResults:
    """By name: all laps of first saves and of later ones, the limits, and why something is not there."""

    first: dict[str, list[Laps]] = field(default_factory=dict)
    later: dict[str, list[Laps]] = field(default_factory=dict)
    limits: dict[str, Samples] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def timed_save(saver: AsyncSaver, path: str, state: State, timeout: float) -> Laps:
    """One save, waited for until it is durable."""
    cpu_start, start = process_tree.cpu_seconds(), time.perf_counter()
    pending = saver.save(path, state.tree)
    returned = time.perf_counter() - start
    pending.wait_staged(timeout)
    staged = time.perf_counter() - start
    wait_durable(saver, pending, path, timeout)
    durable = time.perf_counter() - start
    return Laps(returned, staged, durable, process_tree.cpu_seconds() - cpu_start)


@contextlib.contextmanager
def opened(entry: Entry) -> Iterator[AsyncSaver]:
    """A saver, and afterwards none of the processes that were there when it had been made."""
    before = process_tree.descendants()
    try:
        saver = entry.make()
    except BaseException:
        process_tree.kill(process_tree.descendants() - before)
        raise
    own = process_tree.descendants() - before
    try:
        yield saver
    except BaseException:
        process_tree.kill(own)  # so that closing waits for nobody
        with contextlib.suppress(Exception):
            saver.close()
        raise
    saver.close()
    left = process_tree.remaining(own)
    process_tree.kill(left)
    if left:
        raise RuntimeError(f"closed, it has left {len(left)} processes behind")


class KeptSavers:
    """Savers that stay over several rounds. One that fails is left out from then on; without lastgood, all ends."""

    def __init__(self, left_out: dict[str, str]) -> None:
        self._left_out = left_out
        self._savers: dict[str, AsyncSaver] = {}
        self._stacks: dict[str, contextlib.ExitStack] = {}

    def __enter__(self) -> "KeptSavers":
        return self

    def __exit__(self, *exception: object) -> None:
        for name, stack in reversed(self._stacks.items()):
            unless_left_out(self._left_out, name, stack.close)

    def open(self, entry: Entry) -> None:
        """Make one."""
        stack = contextlib.ExitStack()

        def make() -> None:
            self._savers[entry.saver] = stack.enter_context(opened(entry))
            self._stacks[entry.saver] = stack

        unless_left_out(self._left_out, entry.saver, make)

    def each(self, use: Callable[[str, AsyncSaver], None]) -> None:
        """One after the other; what fails is closed at once."""
        for name, saver in self._savers.items():
            unless_left_out(self._left_out, name, partial(self._use, use, name, saver))

    def _use(self, use: Callable[[str, AsyncSaver], None], name: str, saver: AsyncSaver) -> None:
        try:
            use(name, saver)
        except BaseException as error:
            stack = self._stacks.pop(name)
            with contextlib.suppress(type(error)):
                stack.__exit__(type(error), error, error.__traceback__)
            raise


def unless_left_out(left_out: dict[str, str], name: str, run: Callable[[], None]) -> None:
    """Note why it failed, and do not run it again. Without lastgood there is nothing to compare: that is raised."""
    if name in left_out:
        return
    try:
        run()
    except Exception as error:
        if name == LASTGOOD:
            raise
        left_out[name] = reason(error)


class AsyncMeasurement:
    """The rounds over one state."""

    def __init__(self, what: str, state: State, directory: str, how: AsyncRounds) -> None:
        self.results = AsyncResults()
        self._what = what
        self._state = state
        self._directory = directory
        self._how = how
        self._count = 0

    def run(self, entries: list[Entry], limits: list[Contender]) -> AsyncResults:
        """First saves, then later ones beside the limits."""
        left_out = self.results.left_out
        for number in range(1, self._how.first + 1):
            for entry in entries:
                unless_left_out(left_out, entry.saver, partial(self._first_save, entry, number))
        with KeptSavers(left_out) as savers:
            for entry in entries:
                if not entry.prewarm:
                    savers.open(entry)
            for number in range(0, self._how.later + 1):  # the first of these is not measured
                for limit in limits:
                    unless_left_out(left_out, limit.name, partial(self._measure_limit, limit, number))
                savers.each(partial(self._later_save, number))
        progress("")
        return self.results

    def _first_save(self, entry: Entry, number: int) -> None:
        self._progress(f"first save {number} of {self._how.first}: {entry.first_name}")
        with opened(entry) as saver:
            if entry.prewarm:
                saver.prewarm(self._state.tree)
            laps = self._save(saver, check=entry.saver if number == 1 else "")
        self.results.first.setdefault(entry.first_name, []).append(laps)

    def _later_save(self, number: int, name: str, saver: AsyncSaver) -> None:
        self._progress(f"round {number} of {self._how.later}: {name}")
        laps = self._save(saver)
        if number > 0:
            self.results.later.setdefault(name, []).append(laps)

    def _measure_limit(self, limit: Contender, number: int) -> None:
        self._progress(f"round {number} of {self._how.later}: {limit.name}")
        settle(self._how.touched_bytes)
        try:
            start = time.perf_counter()
            limit.run()
            seconds = time.perf_counter() - start
        finally:
            limit.after()
        if number > 0:
            self.results.limits.setdefault(limit.name, Samples()).seconds.append(seconds)

    def _save(self, saver: AsyncSaver, check: str = "") -> Laps:
        path = os.path.join(self._directory, f"async-{self._count}")
        self._count += 1
        settle(self._how.touched_bytes)
        try:
            laps = timed_save(saver, path, self._state, self._how.timeout)
            if check:
                require_same(saver.load(path, self._state), self._state.tree, check)
            return laps
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _progress(self, line: str) -> None:
        progress(f"{self._what}: {line}")
