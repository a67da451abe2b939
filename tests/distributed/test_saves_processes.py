"""Checkpoints of several ranks, each a process of its own, with a barrier over a real store: whole, and half-way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import reserved_port
from tests.distributed.saving_ranks import load, save, save_and_fail, save_until_pre_commit, set_up
from tests.helpers.saves import assert_state, contents, temporaries
from tests.helpers.workers import Worker

from lastgood.errors import (
    BarrierTimeoutError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UncommittedCheckpointError,
)

WORLD_SIZE = 3


class Job:
    """Three ranks that train together."""

    def __init__(self, timeout_secs: float) -> None:
        self.ranks = [Worker() for _ in range(WORLD_SIZE)]
        with reserved_port() as port:
            for rank, worker in enumerate(self.ranks):
                worker.start(set_up, rank, WORLD_SIZE, port, timeout_secs)
            for worker in self.ranks:
                worker.result()

    def save(self, path: Path, number: int) -> list[BaseException | None]:
        """Every rank its own state; how each ended."""
        for rank, worker in enumerate(self.ranks):
            worker.start(save, str(path), number + rank)
        return [outcome_of(worker) for worker in self.ranks]

    def assert_loads(self, path: Path, number: int) -> None:
        for rank, worker in enumerate(self.ranks):
            assert_state(worker.call(load, str(path)), number + rank)

    def kill(self) -> None:
        for worker in self.ranks:
            worker.kill()


def outcome_of(worker: Worker) -> BaseException | None:
    try:
        worker.result()
    except Exception as error:
        return error
    return None


@pytest.fixture
def start_job() -> Iterator[Any]:
    jobs: list[Job] = []

    def start(timeout_secs: float = 600) -> Job:
        jobs.append(Job(timeout_secs))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_three_ranks_commit_checkpoint_after_checkpoint_and_each_reads_its_own(start_job: Any, tmp_path: Path) -> None:
    job = start_job()
    for number in (10, 20):
        path = tmp_path / f"step-{number}"
        assert job.save(path, number) == [None] * WORLD_SIZE
        assert sorted(contents(path)) == ["checkpoint_0.pt", "checkpoint_1.pt", "checkpoint_2.pt", "manifest.json"]
        job.assert_loads(path, number)

    # Onto a committed one: every rank refuses, at once, and the next save is in step again.
    before = contents(tmp_path)
    for outcome in job.save(tmp_path / "step-10", 30):
        assert isinstance(outcome, CheckpointExistsError)
    assert contents(tmp_path) == before
    assert job.save(tmp_path / "step-30", 30) == [None] * WORLD_SIZE
    job.assert_loads(tmp_path / "step-30", 30)

    # Files of two saves, mixed: each is whole, and neither checkpoint is.
    (tmp_path / "step-20" / "checkpoint_1.pt").replace(tmp_path / "step-10" / "checkpoint_1.pt")
    with pytest.raises(CorruptCheckpointError, match="another save"):
        job.ranks[1].call(load, str(tmp_path / "step-10"))
    with pytest.raises(CheckpointNotFoundError, match="rank 1"):
        job.ranks[1].call(load, str(tmp_path / "step-20"))


@pytest.mark.parametrize("victim", range(WORLD_SIZE))
def test_hazard_26_a_rank_killed_before_the_barrier_is_named_and_nothing_is_committed(
    start_job: Any, tmp_path: Path, victim: int
) -> None:
    job = start_job(timeout_secs=4)
    assert job.save(tmp_path / "step-1", 1) == [None] * WORLD_SIZE
    path = tmp_path / "step-2"
    for rank, worker in enumerate(job.ranks):
        if rank == victim:
            worker.start(save_until_pre_commit, str(path), 2, with_pipe=True)
        else:
            worker.start(save, str(path), 2 + rank)
    assert job.ranks[victim].receive() == ("stopped at", "pre_commit")
    job.ranks[victim].kill()
    survivors = [rank for rank in range(WORLD_SIZE) if rank != victim]
    for rank in survivors:
        outcome = outcome_of(job.ranks[rank])
        assert isinstance(outcome, BarrierTimeoutError), outcome
        assert outcome.missing_ranks == (victim,)
        assert "not committed" in str(outcome)
    assert not (path / "manifest.json").exists()
    assert len(temporaries(path)) == 1  # that of the dead
    for rank in survivors:
        with pytest.raises(UncommittedCheckpointError, match="never committed"):
            job.ranks[rank].call(load, str(path))
        assert_state(job.ranks[rank].call(load, str(tmp_path / "step-1")), 1 + rank)

    # The job is started again, as a whole, and saves: to a fresh path, and over what is left.
    job.kill()
    again = start_job()
    for name in ("step-3", "step-2"):
        assert again.save(tmp_path / name, 3) == [None] * WORLD_SIZE
        again.assert_loads(tmp_path / name, 3)
        assert temporaries(tmp_path / name) == []


def test_hazard_26_a_rank_that_fails_ends_the_save_of_all_at_once_and_the_next_one_goes_well(
    start_job: Any, tmp_path: Path
) -> None:
    """The others would wait ten minutes."""
    job = start_job(timeout_secs=600)
    path = tmp_path / "step-1"
    for rank, worker in enumerate(job.ranks):
        worker.start(save_and_fail if rank == 2 else save, str(path), rank)
    outcomes = [outcome_of(worker) for worker in job.ranks]
    assert isinstance(outcomes[2], ValueError)
    for outcome in outcomes[:2]:
        assert isinstance(outcome, BarrierTimeoutError)
        assert outcome.missing_ranks == (2,)
        assert "ValueError: this rank's hook says no" in str(outcome)
    assert not (path / "manifest.json").exists()
    assert not (path / "checkpoint_2.pt").exists()
    assert temporaries(path) == []
    assert job.save(path, 5) == [None] * WORLD_SIZE
    job.assert_loads(path, 5)
