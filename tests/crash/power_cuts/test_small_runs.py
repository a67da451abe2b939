"""Small runs with one rank: the power is cut after every operation, and every state that may be left is recovered from.

Whatever was acknowledged is found again, bit for bit, or something newer is; nothing torn is taken for a checkpoint;
the next save goes well, is what a restore then finds, and clears away what was left.
"""

import random
from collections.abc import Callable

import pytest
from tests.crash.power_cuts.cutting import Cutter, Scenario, is_log
from tests.crash.power_cuts.promises import KILLED
from tests.crash.power_cuts.random_runs import OPERATIONS_OF_A_SAVE, DyingFileOps, killed, save_and_die
from tests.crash.power_cuts.runs_recovered import manager_on
from tests.crash.power_cuts.scenarios import LARGER, SMALL, save
from tests.manager.runs import restore

from lastgood.testing import CrashFileOps

Counting = Callable[[str, int], None]


def named(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios, ids=[scenario.name for scenario in scenarios])


@named(SMALL)
def test_nothing_acknowledged_is_lost_in_any_state(scenario: Scenario, count_cases: Counting) -> None:
    cutter = Cutter(scenario)
    tally = cutter.everywhere()
    assert tally.different > len(cutter.prefixes) / 2
    tally.count(count_cases)


@named(LARGER)
def test_nothing_acknowledged_is_lost_in_some_states_of_larger_runs(
    scenario: Scenario, rng_seed: int, count_cases: Counting
) -> None:
    Cutter(scenario).at_random(random.Random(rng_seed), 25).count(count_cases)


@pytest.mark.crash
@pytest.mark.timeout(600)
@named(LARGER)
def test_nothing_acknowledged_is_lost_in_any_state_of_larger_runs(scenario: Scenario, count_cases: Counting) -> None:
    Cutter(scenario).everywhere().count(count_cases)


@pytest.mark.parametrize("operation", ["make_directory", "replace", "a random one"])
def test_a_save_after_a_kill_survives_the_next_power_cut(operation: str, rng_seed: int, count_cases: Counting) -> None:
    """What the killed process has left was never certain: whoever builds on it has to make it so."""
    rng = random.Random(rng_seed)
    number = str(rng.randrange(OPERATIONS_OF_A_SAVE))
    Cutter(killed(number if operation == "a random one" else operation)).at_random(rng, 30).count(count_cases)


@pytest.mark.crash
@pytest.mark.timeout(1200)
def test_a_save_after_a_kill_at_any_operation_survives_the_next_power_cut(count_cases: Counting) -> None:
    for number in range(OPERATIONS_OF_A_SAVE):
        cutter = Cutter(killed(str(number)))
        death = next(number for number, done in enumerate(cutter.ops.record, 1) if done.note == (KILLED,))
        cutter.everywhere(cutter.prefixes.index(death)).count(count_cases)


def test_nothing_is_removed_on_the_strength_of_what_a_killed_process_has_left() -> None:
    """Its checkpoint has its name, and nobody has made that certain."""
    ops = CrashFileOps()
    with manager_on(ops) as manager:
        save(ops, manager, 1, 1)
    save_and_die(ops, DyingFileOps(ops, after="replace"), None, 2, 2)
    with manager_on(ops, 1) as manager:
        assert manager.latest() == 2
        manager.prune()
    for state in ops.all_states(ops.operation_count, coarse=is_log):
        with manager_on(state) as manager:
            assert restore(manager)[0] in (1, 2)


def test_a_checkpoint_that_a_killed_process_has_left_stays_once_it_was_resumed_from() -> None:
    """Training goes on from it, and may be told by others by its step."""
    ops = CrashFileOps()
    with manager_on(ops) as manager:
        save(ops, manager, 1, 1)
    save_and_die(ops, DyingFileOps(ops, after="replace"), None, 2, 2)
    with manager_on(ops) as manager:
        assert restore(manager)[0] == 2
    for state in ops.all_states(ops.operation_count, coarse=is_log):
        with manager_on(state) as manager:
            assert restore(manager)[0] == 2
