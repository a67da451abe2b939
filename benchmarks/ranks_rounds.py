"""Saves and loads of several ranks in turns: first saves by savers made anew, later ones by savers that stay."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import ranks_work
from async_rounds import Laps
from page_cache import PageCacheError, make_cold, make_warm
from ranks_pool import RankError, RankPool
from ranks_savers import LASTGOOD_LOAD, OURS
from timing import Contender, Results, Samples, progress, reason, settle


@dataclass(frozen=True)
class Written:
    """By one save: what each rank has written, and the bytes of the files that are there afterwards."""

    by_rank: list[int]
    in_files: int


@dataclass(frozen=True)
class RankRounds:
    """How many first saves and how many others are measured, what one may take, and the memory touched before each."""

    first: int
    later: int
    timeout: float
    touched_bytes: int


@dataclass(frozen=True)
class LoadEntry:
    """A line of the tables: these ranks load the files below ``path`` in this way into this layout."""

    name: str
    pool: RankPool
    loader: str
    path: str
    place: str


@dataclass
class RankResults:
    """By name: the laps of first saves and of later ones, what was written, limits, and why something is missing."""

    first: dict[str, list[Laps]] = field(default_factory=dict)
    later: dict[str, list[Laps]] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    limits: Results = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class RankSaves:
    """The rounds of saves over the state that the ranks have."""

    def __init__(self, what: str, pool: RankPool, directory: str, how: RankRounds) -> None:
        self.results = RankResults()
        self._what = what
        self._pool = pool
        self._directory = directory
        self._how = how
        self._count = 0

    def run(self, names: Sequence[str], limits: Sequence[Contender] = ()) -> RankResults:
        """First saves; what is on disk after the first of them is checked. The savers of the last ones stay for the
        later saves, beside the limits; one round more comes ahead, unmeasured."""
        for number in range(1, self._how.first + 1):
            for name in names:
                self._attempt(name, partial(self._first_save, name, number))
        for number in range(self._how.later + 1 if self._how.later else 0):
            for limit in limits:
                self._attempt(limit.name, partial(self._measure_limit, limit, number))
            for name in names:
                self._attempt(name, partial(self._later_save, name, number))
        for name in names:
            self._attempt(name, partial(self._pool.call, ranks_work.close_saver, name))
        progress("")
        return self.results

    def _attempt(self, name: str, run: Callable[[], object]) -> None:
        """What fails is left out from then on; without lastgood, all ends."""
        if name in self.results.left_out:
            return
        try:
            run()
        except (RankError, OSError) as error:
            if name in OURS:
                raise
            self.results.left_out[name] = reason(error)
            with contextlib.suppress(RankError):
                self._pool.call(ranks_work.close_saver, name)

    def _first_save(self, name: str, number: int) -> None:
        progress(f"{self._what}: first save {number} of {self._how.first}: {name}")
        self._pool.call(ranks_work.close_saver, name)
        self._pool.call(ranks_work.open_saver, name)
        laps = self._save(name, check=number == 1)
        self.results.first.setdefault(name, []).append(laps)

    def _later_save(self, name: str, number: int) -> None:
        progress(f"{self._what}: round {number} of {self._how.later}: {name}")
        laps = self._save(name, check=False)
        if number > 0:
            self.results.later.setdefault(name, []).append(laps)

    def _measure_limit(self, limit: Contender, number: int) -> None:
        progress(f"{self._what}: round {number} of {self._how.later}: {limit.name}")
        settle(self._how.touched_bytes)
        try:
            start = time.perf_counter()
            limit.run()
            seconds = time.perf_counter() - start
        finally:
            limit.after()
        if number > 0:
            self.results.limits.setdefault(limit.name, Samples()).seconds.append(seconds)

    def _save(self, name: str, *, check: bool) -> Laps:
        path = os.path.join(self._directory, f"ranks-{self._count}")
        self._count += 1
        settle(self._how.touched_bytes)
        try:
            times = self._pool.call(ranks_work.save, name, path, self._how.timeout)
            in_files = sum(map(os.path.getsize, files_below(path)))
            self.results.written[name] = Written([each.written_bytes for each in times], in_files)
            if check:
                self._pool.call(ranks_work.require_saved, name, path)
                self._pool.call(ranks_work.forget_targets)
            return _laps(times)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def measure_loads(
    what: str, entries: Sequence[LoadEntry], how: RankRounds, *, cold: bool
) -> tuple[Results, dict[str, str]]:
    """All of them in turns. In the round that comes first, unmeasured, every result is compared with what was saved."""
    results: Results = {}
    left_out: dict[str, str] = {}
    for number in range(how.later + 1):
        for entry in entries:
            if entry.name in left_out:
                continue
            progress(f"{what}: round {number} of {how.later}: {entry.name}")
            try:
                seconds, cpu = _timed_load(entry, how.touched_bytes, cold=cold)
                if number == 0:
                    entry.pool.call(ranks_work.check, entry.place)
            except (RankError, PageCacheError) as error:
                if entry.loader == LASTGOOD_LOAD and not isinstance(error, PageCacheError):
                    raise
                left_out[entry.name] = reason(error)
                results.pop(entry.name, None)
                continue
            if number > 0:
                samples = results.setdefault(entry.name, Samples())
                samples.seconds.append(seconds)
                samples.cpu_seconds.append(cpu)
    progress("")
    return results, left_out


def files_below(path: str) -> list[str]:
    """All files of a checkpoint."""
    return [os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names]


def _timed_load(entry: LoadEntry, touched_bytes: int, *, cold: bool) -> tuple[float, float]:
    files = files_below(entry.path)
    (make_cold if cold else make_warm)(files)
    settle(touched_bytes)
    laps = _laps(entry.pool.call(ranks_work.load, entry.loader, entry.path, entry.place))
    return laps.durable, laps.cpu


def _laps(times: Sequence[ranks_work.Times]) -> Laps:
    """A training loop is held up by its own rank alone; a checkpoint is durable when the last rank says so."""
    start = min(each.start for each in times)
    return Laps(
        max(each.returned - each.start for each in times),
        max(each.staged - each.start for each in times),
        max(each.durable for each in times) - start,
        sum(each.cpu for each in times),
    )
