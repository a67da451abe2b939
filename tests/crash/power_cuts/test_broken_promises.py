"""That these tests can fail: a file system that forgets to sync is found out, and what is found can be replayed."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest
from tests.crash.power_cuts.cutting import BrokenPromiseError, Case, Cutter, Scenario
from tests.crash.power_cuts.random_runs import random_run
from tests.crash.power_cuts.replay import main, parse, replay, scenario_named
from tests.crash.power_cuts.scenarios import SMALL
from tests.crash.power_cuts.several_ranks import MEETING

from lastgood.testing import CrashFileOps


class Forgetful:
    """The same operations, but for one: it is never done, and said to have been."""

    def __init__(self, ops: CrashFileOps, forgotten: str) -> None:
        self._ops = ops
        self._forgotten = forgotten

    @property
    def capacity(self) -> int | None:
        return self._ops.capacity

    @capacity.setter
    def capacity(self, capacity: int | None) -> None:
        self._ops.capacity = capacity

    def __getattr__(self, name: str) -> Any:
        return (lambda *arguments: None) if name == self._forgotten else getattr(self._ops, name)


def forgetting(scenario: Scenario, operation: str) -> Scenario:
    return replace(scenario, record=lambda ops: scenario.record(Forgetful(ops, operation)))  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", ["fsync", "fsync_directory"])
@pytest.mark.parametrize("scenario", SMALL, ids=[scenario.name for scenario in SMALL])
def test_what_is_not_synced_is_missed(scenario: Scenario, operation: str) -> None:
    with pytest.raises(BrokenPromiseError, match=f"to see it again:\n.*'{scenario.name}/"):
        Cutter(forgetting(scenario, operation)).everywhere()


@pytest.mark.parametrize("operation", ["fsync", "fsync_directory"])
def test_what_ranks_do_not_sync_is_missed(operation: str, rng_seed: int) -> None:
    """Not everywhere: when no name is ever certain, the states are too many."""
    with pytest.raises(BrokenPromiseError, match="two ranks meet"):
        Cutter(forgetting(MEETING, operation)).at_random(random.Random(rng_seed), 100)


def test_what_is_not_synced_is_missed_in_random_runs(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    scenarios = [forgetting(random_run(rng.getrandbits(32)), "fsync_directory") for _ in range(4)]
    with pytest.raises(BrokenPromiseError, match="random run"):
        [Cutter(scenario).at_random(rng, 50) for scenario in scenarios]


def test_a_broken_promise_can_be_replayed(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    for scenario, cut in (
        (forgetting(SMALL[1], "fsync_directory"), lambda cutter: cutter.everywhere()),
        (forgetting(SMALL[1], "fsync"), lambda cutter: cutter.at_random(rng, 500)),
    ):
        with pytest.raises(BrokenPromiseError) as caught:
            cut(Cutter(scenario))
        # Recorded anew, with other bytes in its files.
        error = caught.value.__cause__
        assert error is not None
        with pytest.raises(type(error), match=re.escape(str(error))):
            replay(caught.value.case, scenario)


def test_random_runs_make_the_same_changes_every_time(rng_seed: int) -> None:
    names = [
        [[done.name, done.target.count("/")] for done in ops.record if done.changes or done.note]
        for ops in (random_run(rng_seed).recorded(), random_run(rng_seed).recorded())
    ]
    assert names[0] == names[1]


def test_a_case_is_named_in_one_word_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("the first save ever", 3, "number 1")
    assert parse(str(case)) == case
    assert scenario_named("random run 17").name == "random run 17"
    for name in ("killed at 3", "killed at replace"):
        assert scenario_named(name).name == name
    with pytest.raises(SystemExit, match="no scenario"):
        scenario_named("of nobody")
    main([str(case)])
    assert capsys.readouterr().out == "all promises are kept\n"
