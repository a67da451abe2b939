"""Recording what the real code does, cutting the power everywhere, and recovering from every state that is left.

A failure says how to see it again: ``python -m tests.crash.power_cuts.replay '<case>'``.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from lastgood.manager.catalog import RUN_LOG_NAME
from lastgood.testing import CrashFileOps

Notes = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Scenario:
    """What is done until the power is cut (``record``, which notes what it was promised), and what comes after.

    ``recover`` is given what was left and the notes until then, and raises where a promise was broken. Recorded twice,
    a scenario makes the same changes of the disk in the same order, though not with the same bytes.
    """

    name: str
    record: Callable[[CrashFileOps], None]
    recover: Callable[[CrashFileOps, Notes], None]

    def recorded(self) -> CrashFileOps:
        """The file system after all of it."""
        ops = CrashFileOps()
        self.record(ops)
        return ops


class Case(NamedTuple):
    """One state: of which scenario, at which of the moments that are worth it, and which of the possible ones."""

    scenario: str
    moment: int
    choice: str

    def __str__(self) -> str:
        return "/".join(map(str, self))


class BrokenPromiseError(AssertionError):
    """A recovery has failed; ``case`` replays it."""

    def __init__(self, message: str, case: Case) -> None:
        super().__init__(message)
        self.case = case

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.case), self.__dict__


def _broken(case: Case, ops: CrashFileOps, prefix: int, state: CrashFileOps) -> BrokenPromiseError:
    """``state`` is what was left, as it was before the recovery."""
    last = [f"{done.name} {done.target}" for done in ops.record[:prefix] if done.changes or done.note][-8:]
    return BrokenPromiseError(
        f"a promise was broken by a power cut; to see it again:\n"
        f"    python -m tests.crash.power_cuts.replay '{case}'\n"
        f"the last changes before the cut: {'; '.join(last)}\n"
        f"unlike after a kill: {'; '.join(_differences(ops.state_after_kill(prefix), state)) or 'nothing'}",
        case,
    )


def _differences(kept: CrashFileOps, left: CrashFileOps) -> Iterator[str]:
    wanted, found = kept.contents(), left.contents()
    for path in sorted({*wanted, *found}):
        if path not in found:
            yield f"{path} is not there"
        elif path not in wanted:
            yield f"{path} is still there"
        elif wanted[path] != found[path]:
            yield f"{path} has {len(found[path])} of {len(wanted[path])} bytes, and not the same"


@dataclass
class Tally:
    """How many states were looked at, and how many recoveries that took: one for all that are the same."""

    states: int = 0
    different: int = 0

    def count(self, count_cases: Callable[[str, int], None]) -> None:
        """For the page that shows how much was tried."""
        count_cases("states after a power cut", self.states)
        count_cases("states after a power cut, without those that are the same as another", self.different)


def is_log(path: str) -> bool:
    """The run's log is never fsynced, and decides nothing: all its states are drawn at random elsewhere."""
    return path.endswith(RUN_LOG_NAME)


class Cutter:
    """Cuts the power in one recording of a scenario. No two states that are the same are recovered from twice."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.ops = scenario.recorded()
        self.prefixes = self.ops.prefixes()
        self.tally = Tally()
        self._seen: set[tuple[str, int]] = set()

    def everywhere(self, first: int = 0) -> Tally:
        """At every moment, from that of this number on, in every way."""
        for moment in range(first, len(self.prefixes)):
            for number, state in enumerate(self.states_at(moment)):
                self._recover(moment, f"number {number}", state)
        return self.tally

    def at_random(self, rng: random.Random, count: int) -> Tally:
        """At so many random moments, each in a random way."""
        for moment in sorted(rng.randrange(len(self.prefixes)) for _ in range(count)):
            seed = rng.getrandbits(32)
            self._recover(moment, f"seed {seed}", self.drawn_at(moment, seed))
        return self.tally

    def states_at(self, moment: int) -> Iterator[CrashFileOps]:
        return self.ops.all_states(self.prefixes[moment], coarse=is_log)

    def drawn_at(self, moment: int, seed: int) -> CrashFileOps:
        return self.ops.random_state(self.prefixes[moment], random.Random(seed))

    def _recover(self, moment: int, choice: str, state: CrashFileOps) -> None:
        self.tally.states += 1
        prefix = self.prefixes[moment]
        notes = self.ops.notes(prefix)
        key = (state.digest(), len(notes))
        if key in self._seen:
            return
        self._seen.add(key)
        self.tally.different += 1
        try:
            self.scenario.recover(state, notes)
        except (Exception, pytest.fail.Exception) as error:
            case = Case(self.scenario.name, moment, choice)
            raise _broken(case, self.ops, prefix, self._state_of(case)) from error

    def replay(self, case: Case) -> None:
        """Recover from this one state; raises what that raises."""
        self.scenario.recover(self._state_of(case), self.ops.notes(self.prefixes[case.moment]))

    def _state_of(self, case: Case) -> CrashFileOps:
        kind, value = case.choice.split()
        if kind == "seed":
            return self.drawn_at(case.moment, int(value))
        return next(itertools.islice(self.states_at(case.moment), int(value), None))
