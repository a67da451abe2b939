"""Several ranks that save in the background: with a barrier among their checkpoint processes, and without one."""

import resource
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import reserved_port
from tests.helpers.saves import assert_state, contents, read, state_of
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.survival import ranks
from tests.survival.traces import ProcessEnd, address_space, holders, names
from tests.survival.trainers import ELEMENTS

from lastgood.builder import make_async_checkpointer
from lastgood.errors import (
    BarrierTimeoutError,
    CheckpointExistsError,
    CheckpointProcessError,
    StorageError,
    UncommittedCheckpointError,
)
from lastgood.format.identity import read_identity
from lastgood.format.manifest import checkpoint_file
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

FILES = ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]


def test_without_a_barrier_each_rank_saves_its_own_file_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "a"
    both = [make_async_checkpointer(rank_info=RankInfo(rank, 2)) for rank in range(2)]
    # The second goes on alone, and then replaces its own file while the first has never saved.
    for number in (10, 20):
        both[1].save(str(path), state_of(number))[1].result(PATIENCE_SECS)
        assert names(path) == ["checkpoint_1.pt"]
    both[0].save(str(path), state_of(30))[1].result(PATIENCE_SECS)
    assert names(path) == ["checkpoint_0.pt", "checkpoint_1.pt"]
    for rank, number in ((0, 30), (1, 20)):
        assert_state(both[rank].load(str(path)), number)
        with closing(LocalStorage().open(checkpoint_file(str(path), rank))) as file:
            identity = read_identity(file)
        assert identity is not None
        assert (identity.rank, identity.world_size, identity.independent) == (rank, 2, True)
    for checkpointer in both:
        checkpointer.close()


class Job:
    """Two trainers, whose checkpoint processes have met."""

    def __init__(self, timeout_secs: float) -> None:
        self.ranks = [Worker() for _ in range(2)]
        with reserved_port() as port:
            for rank, worker in enumerate(self.ranks):
                worker.start(ranks.set_up, rank, port, timeout_secs)
            self.processes = [ProcessEnd(worker.result()) for worker in self.ranks]

    def kill(self) -> None:
        for worker in self.ranks:
            worker.kill()
        for process in self.processes:
            with process:
                assert process.wait()


@pytest.fixture
def start_job() -> Iterator[Any]:
    jobs: list[Job] = []

    def start(timeout_secs: float = 600) -> Job:
        jobs.append(Job(timeout_secs))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_hazard_04_two_trainers_killed_after_staging_still_get_their_one_manifest(
    start_job: Any, tmp_path: Path
) -> None:
    job = start_job()
    path = tmp_path / "step-1"
    for rank, worker in enumerate(job.ranks):
        worker.start(ranks.save, str(path), 10 + rank)
    for worker in job.ranks:
        assert worker.result() is None
    assert names(path) == FILES
    for rank in range(2):
        assert_state(read(path, rank, 2), 10 + rank)
    before = contents(path)
    for worker in job.ranks:
        with pytest.raises(CheckpointExistsError):
            worker.call(ranks.save, str(path), 15)
    assert contents(path) == before

    # Rank 0 is killed while rank 1 has not even begun, and rank 1 once it has staged.
    path = tmp_path / "step-2"
    memory = set()
    for rank, worker in enumerate(job.ranks):
        memory |= worker.call(ranks.stage, str(path), 20 + rank)
        worker.kill()
    for process in job.processes:
        assert process.wait()
    assert names(path) == FILES
    for rank in range(2):
        assert_state(read(path, rank, 2), 20 + rank)
    assert memory
    assert holders(memory) == []


def test_hazard_26_a_trainer_killed_before_it_has_staged_is_told_to_the_other_rank(
    start_job: Any, tmp_path: Path
) -> None:
    """Which would else wait for ten minutes."""
    job = start_job()
    path = tmp_path / "step-1"
    first, second = job.ranks
    second.start(ranks.stage_half, str(path), 1, with_pipe=True)
    assert second.receive() == "half"
    first.start(ranks.save, str(path), 0)
    second.kill()
    with pytest.raises(BarrierTimeoutError, match="the trainer is gone") as caught:
        first.result()
    assert caught.value.missing_ranks == (1,)
    assert job.processes[1].wait()
    assert not (path / "manifest.json").exists()
    for rank in range(2):
        with pytest.raises((UncommittedCheckpointError, FileNotFoundError)):
            read(path, rank, 2)


def test_hazard_26_a_trainer_killed_before_it_asked_for_a_save_is_told_to_the_other_rank(
    start_job: Any, tmp_path: Path
) -> None:
    """Its checkpoint process, which has nothing to do, says so before it leaves."""
    job = start_job()
    first, second = job.ranks
    second.kill()
    with pytest.raises(BarrierTimeoutError, match="the trainer is gone") as caught:
        first.call(ranks.save, str(tmp_path / "step-1"), 0)
    assert caught.value.missing_ranks == (1,)
    assert job.processes[1].wait()


def test_hazard_26_a_save_that_was_not_begun_when_its_trainer_was_killed_is_told_to_the_other_rank(
    start_job: Any, tmp_path: Path
) -> None:
    """It stands in the queue of the checkpoint process, behind one at which that waits for the other rank."""
    job = start_job()
    first, second = job.ranks
    second.call(ranks.stage, str(tmp_path / "step-1"), 11)
    second.start(ranks.stage_half, str(tmp_path / "step-2"), 1, with_pipe=True)
    assert second.receive() == "half"
    second.kill()
    first.call(ranks.save, str(tmp_path / "step-1"), 10)
    assert names(tmp_path / "step-1") == FILES
    with pytest.raises(BarrierTimeoutError, match="the trainer is gone") as caught:
        first.call(ranks.save, str(tmp_path / "step-2"), 0)
    assert caught.value.missing_ranks == (1,)
    assert job.processes[1].wait()


def test_hazard_26_a_directory_that_only_the_trainer_can_enter_is_told_to_the_other_rank(
    start_job: Any, tmp_path: Path
) -> None:
    job = start_job()
    first, second = job.ranks
    disk = tmp_path / "disk"
    disk.mkdir()
    second.start(ranks.save_where_nobody_else_comes, str(disk), 1, with_pipe=True)
    if (problem := second.receive()) != "saving":
        pytest.skip(f"a file system of its own cannot be mounted here: {problem}")
    with pytest.raises(BarrierTimeoutError, match="cannot enter") as caught:
        first.call(ranks.save, str(tmp_path / "step-1"), 0)
    assert caught.value.missing_ranks == (1,)
    with pytest.raises(StorageError, match=r"cannot enter .* Save to an absolute path"):
        second.result()
    assert list(disk.iterdir()) == []


def test_hazard_26_a_snapshot_that_cannot_be_mapped_is_told_to_the_other_rank(start_job: Any, tmp_path: Path) -> None:
    """No address space is left for the checkpoint process of one; when there is some again, it serves the next save."""
    job = start_job()
    first, second = job.ranks
    pid = job.processes[1].pid
    limits = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + (64 << 20), limits[1]))
    second.start(ranks.save, str(tmp_path / "step-1"), 1, 10 * ELEMENTS)
    with pytest.raises(BarrierTimeoutError, match="could not map the memory") as caught:
        first.call(ranks.save, str(tmp_path / "step-1"), 0)
    assert caught.value.missing_ranks == (1,)
    with pytest.raises(CheckpointProcessError, match="could not map the memory"):
        second.result()
    resource.prlimit(pid, resource.RLIMIT_AS, limits)
    second.start(ranks.save, str(tmp_path / "step-2"), 1)
    first.call(ranks.save, str(tmp_path / "step-2"), 0)
    second.result()
    assert names(tmp_path / "step-2") == FILES
