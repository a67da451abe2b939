"""What is measured of asynchronous saves: the contenders, the states, and what is aimed at."""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from async_once import FIRST, LATER, run_alone
from async_rounds import AsyncMeasurement, AsyncResults, AsyncRounds, Entry, KeptSavers, Laps
from async_savers import ASYNC_SAVERS, LASTGOOD, PEERS, AsyncSaver
from copy_limit import WarmCopy
from report import Aim, AnySection, AtMost, MemorySection, Section, SlowdownSection
from sections import WRITE_LIMITS, write_limits
from states import make_state
from timing import Contender, Results, Samples, progress, settle
from training_loop import STEPS_A_SAVE, THREADS, TrainingLoop

COPY_LIMIT = "limit: warm copy, 2 threads"
COPY_THREADS = 2
FIRST_PREWARMED = f"{LASTGOOD}, first save, prewarmed"

COPY_SHARE = 0.8
PREWARMED_SHARE = 0.8
WRITE_SHARE = 0.85
TIMES_AS_FAST_AS_PEERS = 2.5
MEMORY_OVER_STATE = 100 << 20
SHARE_OF_THE_BEST_SLOWDOWN = 0.25

RETURNS_WITHIN = 0.005
"""Of the training state."""

SMALL_RETURNS, SMALL_STAGED, SMALL_DURABLE = 0.15, 0.5, 1.2


@dataclass(frozen=True)
class AsyncOptions:
    """Sizes, rounds, and what a single save of a single contender may take."""

    directory: str
    training_bytes: int
    small_tensors: int
    tensor_bytes: int
    rounds: int
    touch_memory: bool
    timeout: float = 120.0
    alone_timeout: float = 60.0


def measure_async_training_state(options: AsyncOptions) -> Iterator[AnySection]:
    """All contenders in turns over a realistic state."""
    aims = _Aims(at_most_returned=RETURNS_WITHIN)
    yield from _measure_large(f"training:{options.training_bytes}", "async_training", "training state", options, aims)


def measure_async_one_tensor(options: AsyncOptions) -> Iterator[AnySection]:
    """All contenders in turns over a state that is one tensor; fewer rounds."""
    fewer = replace(options, rounds=min(options.rounds, 2))
    yield from _measure_large(f"tensor:{options.tensor_bytes}", "async_tensor", "one large tensor", fewer, _Aims())


def measure_async_small_tensors(options: AsyncOptions) -> Iterator[AnySection]:
    """lastgood in turns with itself; each other once and in a process of its own, whose resources it may use up."""
    description, what = f"small:{options.small_tensors}", f"{options.small_tensors:,} small tensors"
    state = make_state(description)
    how = _rounds(options, state.nbytes)
    results = AsyncMeasurement(what, state, options.directory, how).run(_entries([LASTGOOD]), [])
    for name in PEERS:
        progress(f"{what}: {name}")
        found, why = run_alone(name, description, options.directory, options.alone_timeout, memory=False)
        if FIRST in found:
            results.first[_first(name)] = [Laps(**found[FIRST])]
        if LATER in found:
            results.later[name] = [Laps(**found[LATER])]
        if why:
            results.left_out[name] = why
    yield from _time_sections(
        "async_small", what, state.nbytes, results, _Aims(SMALL_RETURNS, SMALL_STAGED, SMALL_DURABLE)
    )
    yield _memory_section("async_small", what, description, state.nbytes, options)


def measure_async_slowdown(options: AsyncOptions) -> SlowdownSection:
    """A real training loop that saves every ten steps, against the same without saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _Slowdown(options).measure()
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Aims:
    """In seconds; those against limits and peers are for large states, whose size decides."""

    at_most_returned: float | None = None
    at_most_staged: float | None = None
    at_most_durable: float | None = None


def _measure_large(description: str, key: str, what: str, options: AsyncOptions, aims: _Aims) -> Iterator[AnySection]:
    state = make_state(description)
    copy = WarmCopy(state.flat.values(), COPY_THREADS)
    limits = [Contender(COPY_LIMIT, copy.run)]
    limits += write_limits(state.nbytes, os.path.join(options.directory, "limit"))
    how = _rounds(options, state.nbytes)
    results = AsyncMeasurement(what, state, options.directory, how).run(_entries(list(ASYNC_SAVERS)), limits)
    copy.close()
    nbytes = state.nbytes
    del state, copy, limits  # the next processes need the memory
    yield from _time_sections(key, what, nbytes, results, aims)
    yield _memory_section(key, what, description, nbytes, options)


def _rounds(options: AsyncOptions, nbytes: int) -> AsyncRounds:
    touched = nbytes + nbytes // 4 if options.touch_memory else 0
    return AsyncRounds(min(options.rounds, 2), options.rounds, options.timeout, touched)


def _entries(names: Sequence[str]) -> list[Entry]:
    entries = [Entry(name, ASYNC_SAVERS[name], _first(name)) for name in names]
    if LASTGOOD in names:
        entries.insert(1, Entry(LASTGOOD, ASYNC_SAVERS[LASTGOOD], FIRST_PREWARMED, prewarm=True))
    return entries


def _first(name: str) -> str:
    return f"{name}, first save"


def _time_sections(key: str, what: str, nbytes: int, results: AsyncResults, aims: _Aims) -> Iterator[Section]:
    """Until save returns, until training may go on, until durable."""

    def section(phase: str, title: str, rows: Results, ratios: Sequence[Aim], limit: float | None) -> Section:
        at_most = [] if limit is None else [AtMost(LASTGOOD, limit)]
        left_out = results.left_out if phase == "returned" else {}
        title = f"asynchronous save, {what}: {title}"
        moves_data = bool(results.limits) and phase != "returned"
        return Section(f"{key}_{phase}", title, nbytes, rows, ratios, moves_data, left_out, at_most)

    returned = _samples(results.later, lambda laps: laps.returned)
    yield section("returned", "until save returns", returned, [], aims.at_most_returned)

    copy_limits = {name: samples for name, samples in results.limits.items() if name == COPY_LIMIT}
    staged = copy_limits | _samples(results.later, lambda laps: laps.staged)
    staged |= _samples(results.first, lambda laps: laps.staged)
    ratios = [Aim(LASTGOOD, (COPY_LIMIT,), COPY_SHARE), Aim(FIRST_PREWARMED, (LASTGOOD,), PREWARMED_SHARE)]
    yield section("staged", "until training may change the state", staged, ratios, aims.at_most_staged)

    disk_limits = {name: samples for name, samples in results.limits.items() if name != COPY_LIMIT}
    durable = disk_limits | _samples(results.later, lambda laps: laps.durable, cpu=True)
    ratios = [Aim(LASTGOOD, tuple(WRITE_LIMITS), WRITE_SHARE)]
    if disk_limits:
        ratios.append(Aim(LASTGOOD, PEERS, TIMES_AS_FAST_AS_PEERS))
    yield section("durable", "until durable", durable, ratios, aims.at_most_durable)


def _samples(found: Mapping[str, list[Laps]], phase: Callable[[Laps], float], *, cpu: bool = False) -> Results:
    return {
        name: Samples([phase(one) for one in laps], [one.cpu for one in laps] if cpu else [])
        for name, laps in found.items()
    }


def _memory_section(key: str, what: str, description: str, nbytes: int, options: AsyncOptions) -> MemorySection:
    """Each contender by itself, in a process that holds the state and nothing else."""
    extra: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in ASYNC_SAVERS:
        progress(f"{what}: memory: {name}")
        found, why = run_alone(name, description, options.directory, options.timeout, memory=True)
        if FIRST in found:
            extra[name] = found[FIRST]
        if why:
            left_out[name] = why
    progress("")
    title = f"asynchronous save, {what}: extra peak memory of all processes"
    at_most = {LASTGOOD: nbytes + MEMORY_OVER_STATE}
    return MemorySection(nbytes, extra, at_most, f"{key}_memory", title, left_out)


class _Slowdown:
    """The rounds of the training loop. Each ten steps with a save are compared with those before and after them."""

    def __init__(self, options: AsyncOptions) -> None:
        self._options = options
        self._loop = TrainingLoop(options.directory)
        self._left_out: dict[str, str] = {}
        self._step_seconds: list[float] = []
        self._lost_steps: dict[str, list[float]] = {}

    def measure(self) -> SlowdownSection:
        with KeptSavers(self._left_out) as savers:
            for name, make in ASYNC_SAVERS.items():
                savers.open(Entry(name, make, name))
            savers.each(self._warm_up)
            for number in range(1, self._options.rounds + 1):
                self._round(number, savers)
        progress("")
        for name in self._left_out:
            self._lost_steps.pop(name, None)
        return self._section()

    def _warm_up(self, name: str, saver: AsyncSaver) -> None:
        progress(f"training loop: warming up: {name}")
        self._loop.run(saver, self._options.timeout)

    def _round(self, number: int, savers: KeptSavers) -> None:
        before = self._run(None)

        def run(name: str, saver: AsyncSaver) -> None:
            nonlocal before
            progress(f"training loop: round {number} of {self._options.rounds}: {name}")
            seconds = self._run(saver)
            after = self._run(None)
            step = (before + after) / 2 / STEPS_A_SAVE
            self._lost_steps.setdefault(name, []).append(seconds / step - STEPS_A_SAVE)
            self._step_seconds.append(step)
            before = after

        savers.each(run)

    def _run(self, saver: AsyncSaver | None) -> float:
        settle(0)
        return self._loop.run(saver, self._options.timeout)

    def _section(self) -> SlowdownSection:
        medians = [statistics.median(self._lost_steps[name]) for name in PEERS if name in self._lost_steps]
        best = min(medians, default=0.0)
        at_most = []
        if best > 0:  # else other work on the machine hides what the others lose
            at_most = [AtMost(LASTGOOD, SHARE_OF_THE_BEST_SLOWDOWN * best)]
        title = f"training that saves every {STEPS_A_SAVE} steps: lost by each save"
        nbytes = self._loop.state().nbytes
        return SlowdownSection(
            "async_slowdown", title, nbytes, self._step_seconds, self._lost_steps, at_most, self._left_out
        )
