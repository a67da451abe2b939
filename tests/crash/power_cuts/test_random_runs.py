"""Long runs with saves, failures, kills, restarts and retention in any order; the power is cut at random moments."""

import contextlib
import os
import queue
import random
from collections.abc import Callable
from functools import partial

import pytest
from tests.crash.power_cuts.cutting import Cutter, Tally
from tests.crash.power_cuts.random_runs import cut_random_run, random_run
from tests.helpers.workers import Worker

from lastgood.testing.storage_backend_tests import running

Counting = Callable[[str, int], None]

STATES = 100_000
STATES_OF_A_RUN = 500


def test_nothing_acknowledged_is_lost_whatever_happens_in_a_run(rng_seed: int, count_cases: Counting) -> None:
    rng = random.Random(rng_seed)
    for _ in range(5):
        Cutter(random_run(rng.getrandbits(32))).at_random(rng, 40).count(count_cases)


@pytest.mark.crash
@pytest.mark.timeout(2400)
def test_nothing_acknowledged_is_lost_in_a_hundred_thousand_states(rng_seed: int, count_cases: Counting) -> None:
    rng = random.Random(rng_seed)
    seeds: queue.SimpleQueue[int] = queue.SimpleQueue()
    for _ in range(STATES // STATES_OF_A_RUN):
        seeds.put(rng.getrandbits(32))
    tallies: list[Tally] = []

    def work(worker: Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                tallies.append(worker.call(cut_random_run, seeds.get_nowait(), STATES_OF_A_RUN))

    workers = [Worker() for _ in range(os.cpu_count() or 1)]
    try:
        with running(*(partial(work, worker) for worker in workers)):
            pass
    finally:
        for worker in workers:
            worker.kill()
    for tally in tallies:
        tally.count(count_cases)
    assert sum(tally.states for tally in tallies) == STATES
