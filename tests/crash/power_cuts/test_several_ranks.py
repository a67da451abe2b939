"""Two ranks: their checkpoint is there on both or on none, and never made of two saves, whatever a power cut leaves."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.crash.power_cuts.cutting import Cutter, Scenario
from tests.crash.power_cuts.runs_recovered import read_at
from tests.crash.power_cuts.several_ranks import LARGER, MEETING, path_of
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.saves import NotingBarrier
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import tiny

from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.storage.local import LocalStorage
from lastgood.testing import CrashFileOps
from lastgood.types import RankInfo

Counting = Callable[[str, int], None]

larger = pytest.mark.parametrize("scenario", LARGER, ids=[scenario.name for scenario in LARGER])


def test_nothing_acknowledged_is_lost_in_any_state(count_cases: Counting) -> None:
    cutter = Cutter(MEETING)
    tally = cutter.everywhere()
    assert tally.different > len(cutter.prefixes) / 2
    tally.count(count_cases)


@larger
def test_nothing_acknowledged_is_lost_in_some_states_of_other_saves(
    scenario: Scenario, rng_seed: int, count_cases: Counting
) -> None:
    Cutter(scenario).at_random(random.Random(rng_seed), 30).count(count_cases)


@pytest.mark.crash
@pytest.mark.timeout(600)
@larger
def test_nothing_acknowledged_is_lost_in_any_state_of_other_saves(scenario: Scenario, count_cases: Counting) -> None:
    Cutter(scenario).everywhere().count(count_cases)


class _Held:
    """The operations of rank 0, which is held back once its manifest has its name, and before that is certain."""

    def __init__(self, ops: CrashFileOps, go_on: threading.Event) -> None:
        self._ops = ops
        self._go_on = go_on

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def held(*arguments: Any) -> Any:
            result = operation(*arguments)
            if name == "link":
                assert self._go_on.wait(PATIENCE_SECS)
            return result

        return held


def test_no_rank_returns_before_the_manifest_is_certain() -> None:
    ops, other_has_returned = CrashFileOps(), threading.Event()
    meeting = threading.Barrier(2)
    writers = [
        CheckpointWriter(
            CheckpointWriterConfig(), RankInfo(rank, 2), NotingBarrier(meeting=meeting), storage=LocalStorage(each)
        )
        for rank, each in ((0, _Held(ops, other_has_returned)), (1, ops))  # type: ignore[arg-type]
    ]
    saves = [start(writer.write, path_of(1), tiny(10 + rank)) for rank, writer in enumerate(writers)]
    try:
        saves[1].result(PATIENCE_SECS)
        returned_at = ops.operation_count
    finally:
        other_has_returned.set()
    assert finished(saves) == [None, None]
    for state in ops.all_states(returned_at):
        assert read_at(state, path_of(1), 1, 2) == 11
