"""Ranks that vote, each a trainer with a checkpoint process: what happens to all when something happens to one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.distributed import ending_script
from tests.distributed import voting_ranks as ranks
from tests.distributed.voting_ranks import order
from tests.helpers.saves import assert_state, contents, read
from tests.helpers.workers import Worker
from tests.survival.traces import ProcessEnd
from tests.unit.coordination.ranks_here import coordinations, outcome_in

from lastgood._coordination.calls import Coordination, SaveCalls
from lastgood._coordination.connection import serve
from lastgood.errors import UncommittedCheckpointError
from lastgood.format.manifest import checkpoint_file
from lastgood.storage.local import LocalStorage


class Job:
    """Trainers of one training, which have no process group any more when they save."""

    def __init__(self, world_size: int, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.orders = folder / "orders"
        self.ranks = [Worker() for _ in range(world_size)]
        for rank, worker in enumerate(self.ranks):
            worker.start(ranks.set_up, rank, world_size, str(folder / "rendezvous"), str(self.orders))
        self.processes = [worker.result() for worker in self.ranks]

    def save(self, path: Path, number: int) -> list[str]:
        """How it ended on each rank."""
        self.start(path, number)
        return self.outcomes()

    def start(self, path: Path, number: int, **wishes: str) -> None:
        for rank, worker in enumerate(self.ranks):
            wish = wishes.get(f"rank_{rank}")
            if wish is None:
                worker.start(ranks.save, str(path), number + rank)
            else:
                worker.start(ranks.save_wishing, str(path), number + rank, wish)

    def outcomes(self) -> list[str]:
        return [worker.result() for worker in self.ranks]

    def assert_saves(self, path: Path, number: int) -> None:
        assert self.save(path, number) == ["saved"] * len(self.ranks)
        for rank in range(len(self.ranks)):
            assert_state(read(path, rank, len(self.ranks)), number + rank)

    def kill(self) -> None:
        for worker in self.ranks:
            worker.kill()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    job = Job(3, tmp_path_factory.mktemp("three"))
    yield job
    for worker in job.ranks:
        worker.start(ranks.close)
    for worker in job.ranks:
        worker.result()
    job.kill()


def assert_not_committed(path: Path, world_size: int) -> None:
    assert not (path / "manifest.json").exists()
    for rank in range(world_size):
        with pytest.raises((UncommittedCheckpointError, FileNotFoundError)):
            read(path, rank, world_size)


def test_hazard_28_ranks_commit_without_any_collective_of_the_training(three: Job, tmp_path: Path) -> None:
    """There is no process group at all."""
    for step in (1, 2):
        three.assert_saves(tmp_path / f"step-{step}", step)
    assert json.loads((tmp_path / "lastgood-epoch.json").read_text())["epoch"]["epoch"] == 1


@pytest.mark.parametrize(
    ("verb", "operation", "what"),
    [
        ("kill", "open_exclusive", "before it has begun to write its file"),
        ("kill", "pwrite", "in the middle of it"),
        ("kill after", "replace", "when its file has its name"),
    ],
)
def test_hazard_26_a_rank_whose_process_is_killed_ends_the_save_of_all_at_once(
    three: Job, tmp_path: Path, verb: str, operation: str, what: str
) -> None:
    """The others would wait ten minutes. Nothing is begun anew on any other rank."""
    before = [worker.call(ranks.process) for worker in three.ranks]
    three.assert_saves(tmp_path / "step-1", 1)
    path = tmp_path / "step-2"
    order(three.orders, 1, verb, operation, "checkpoint_1.pt")
    told = three.save(path, 2)
    assert told[1].startswith("CheckpointProcessError: Child process terminated unexpectedly")
    for rank in (0, 2):
        assert told[rank].startswith("BarrierTimeoutError")
        assert "rank 1 gave up: CheckpointProcessError: Child process terminated unexpectedly" in told[rank], what
        assert "SIGKILL" in told[rank]
    assert_not_committed(path, 3)
    three.assert_saves(tmp_path / "step-3", 3)
    three.assert_saves(path, 4)  # over what the dead has left
    after = [worker.call(ranks.process) for worker in three.ranks]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_the_process_of_rank_0_killed_before_the_manifest_fails_that_save_alone(three: Job, tmp_path: Path) -> None:
    """With it goes the store in which the ranks meet; the next process of rank 0 serves one at the same address."""
    before = [worker.call(ranks.process) for worker in three.ranks]
    path = tmp_path / "step-1"
    order(three.orders, 0, "kill", "link", "manifest.json")
    told = three.save(path, 1)
    assert told[0].startswith("CheckpointProcessError: Child process terminated unexpectedly")
    for rank in (1, 2):
        assert told[rank].startswith("BarrierTimeoutError")
        assert "rank 0's checkpoint process, or rank 0 itself, has ended" in told[rank]
    assert sorted(name for name in contents(path) if name.startswith("checkpoint")) == [
        f"checkpoint_{rank}.pt" for rank in range(3)
    ]
    assert_not_committed(path, 3)
    three.assert_saves(tmp_path / "step-2", 2)
    three.assert_saves(path, 3)
    after = [worker.call(ranks.process) for worker in three.ranks]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_the_process_of_rank_0_killed_after_the_manifest_leaves_a_checkpoint(three: Job, tmp_path: Path) -> None:
    """What the others say is what is on disk, though nobody could tell them."""
    path = tmp_path / "step-1"
    order(three.orders, 0, "kill after", "link", "manifest.json")
    told = three.save(path, 1)
    assert told[0].startswith("CheckpointProcessError")
    assert told[1:] == ["saved", "saved"]
    for rank in range(3):
        assert_state(read(path, rank, 3), 1 + rank)
    three.assert_saves(tmp_path / "step-2", 2)


def test_hazard_26_what_a_rank_fails_with_is_what_all_fail_with(three: Job, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    three.start(path, 1, rank_2="no")
    told = three.outcomes()
    assert told[2].startswith("ValueError: this rank's hook says no")
    for rank in (0, 1):
        assert told[rank].startswith("BarrierTimeoutError")
        assert "rank 2 gave up: ValueError: this rank's hook says no" in told[rank]
    assert_not_committed(path, 3)

    order(three.orders, 1, "fail", "pwrite", "checkpoint_1.pt")
    told = three.save(path, 2)
    assert told[1].startswith("StorageError")
    for rank in (0, 2):
        assert "rank 1 gave up: StorageError" in told[rank]
        assert "not enough space" in told[rank]
    assert_not_committed(path, 3)

    # Its checkpoint process never hears of it.
    for rank, worker in enumerate(three.ranks):
        worker.start(ranks.save_what_cannot_be if rank == 0 else ranks.save, str(path), 3 + rank)
    told = three.outcomes()
    assert told[0].startswith("UnsupportedStateError")
    for rank in (1, 2):
        assert "rank 0 gave up: UnsupportedStateError" in told[rank]
        assert "'lock'" in told[rank]
    assert_not_committed(path, 3)
    three.assert_saves(path, 4)


# Jobs that come to an end


@pytest.fixture
def start_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    jobs: list[Job] = []

    def start(world_size: int = 2) -> Job:
        jobs.append(Job(world_size, tmp_path_factory.mktemp("job")))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_hazard_29_a_stopped_job_that_goes_on_when_another_has_taken_over_publishes_nothing(
    start_job: Any, tmp_path: Path
) -> None:
    """Then its successor dies too, right after it has staged: its checkpoint processes commit among themselves."""
    old, path = start_job(), tmp_path / "step-2"
    old.assert_saves(tmp_path / "step-1", 1)
    # Rank 1's bytes are durable, and have no name; its process stops there. Rank 0 waits for its vote.
    old.ranks[0].call(ranks.stage, str(path), 2)
    old.ranks[1].call(ranks.stage, str(path), 3, "wait")
    place, name, seen = old.ranks[1].call(ranks.at_gate)
    assert (place, name, seen) == ("pre_commit", str(path), ["wish"])  # no hook sees what the ranks tell each other
    os.kill(old.processes[1], signal.SIGSTOP)
    # Whoever resumes waits for this lock, and then takes over.
    assert LocalStorage().try_lock(checkpoint_file(str(path), 0)) is None

    young = start_job()
    young.assert_saves(tmp_path / "step-3", 5)
    old.ranks[1].call(ranks.open_gate)
    os.kill(old.processes[1], signal.SIGCONT)
    assert old.ranks[1].call(ranks.outcome).startswith("SupersededError: another job has taken over")
    told = old.ranks[0].call(ranks.outcome)
    assert told.startswith("BarrierTimeoutError")
    assert "rank 1 gave up: SupersededError: another job has taken over" in told
    assert not (path / "checkpoint_1.pt").exists()
    assert_not_committed(path, 2)
    for told in old.save(tmp_path / "step-4", 7):
        assert "another job has taken over" in told
    assert list((tmp_path / "step-4").glob("checkpoint_*")) == []

    # Rank 0 is killed while rank 1 has not even begun, and rank 1 once it has staged.
    ends = [ProcessEnd(pid) for pid in young.processes]
    for rank, worker in enumerate(young.ranks):
        worker.call(ranks.stage, str(path), 20 + rank)
        worker.kill()
    for end in ends:
        with end:
            assert end.wait()
    assert sorted(contents(path)) == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
    for rank in range(2):
        assert_state(read(path, rank, 2), 20 + rank)


def test_hazard_26_nobody_waits_for_a_rank_whose_trainer_ended_before_it_asked_for_the_save(
    start_job: Any, tmp_path: Path
) -> None:
    """Its checkpoint process leaves without having heard of it: the others would wait for ten minutes."""
    job = start_job()
    job.assert_saves(tmp_path / "step-1", 1)
    end = ProcessEnd(job.processes[1])
    # Rank 0 waits for rank 1's vote before that has ended, and for one that has.
    job.ranks[0].call(ranks.stage, str(tmp_path / "step-2"), 2)
    job.ranks[1].kill()
    with end:
        assert end.wait()
    for told in (job.ranks[0].call(ranks.outcome), job.ranks[0].call(ranks.save, str(tmp_path / "step-3"), 3)):
        assert told.startswith("BarrierTimeoutError")
        assert "rank 1 ended, and had not asked for this save" in told
    for step in (2, 3):
        assert_not_committed(tmp_path / f"step-{step}", 2)


def test_hazard_26_nobody_waits_for_a_rank_0_that_is_gone_for_good(start_job: Any, tmp_path: Path) -> None:
    """Its store is gone with its checkpoint process, and no other process will serve one: its trainer is dead, too."""
    job, path = start_job(), tmp_path / "step-2"
    job.assert_saves(tmp_path / "step-1", 1)
    # Rank 1's bytes are durable; it goes to meet the others when rank 0 is gone.
    job.ranks[1].call(ranks.stage, str(path), 2, "wait")
    job.ranks[1].call(ranks.at_gate)
    with ProcessEnd(job.processes[0]) as end:
        job.ranks[0].kill()
        assert end.wait()
    job.ranks[1].call(ranks.open_gate)
    assert job.ranks[1].call(ranks.outcome).startswith("BarrierTimeoutError: rank 1 could not commit")
    assert_not_committed(path, 2)


@pytest.mark.parametrize("ending", ["by the error", "after it has closed", "without closing"])
def test_hazard_26_a_trainer_that_ends_when_its_process_was_killed_tells_the_others_first(
    tmp_path: Path, ending: str
) -> None:
    """And does not abort: the thread that tells them is in torch when the interpreter ends."""
    first = coordinations(3)[0]
    assert first.listener is not None
    server, path = serve(first.listener, 3), str(tmp_path / "step-1")
    port, project = first.port, str(Path(__file__).parents[2])
    script = subprocess.run(
        [sys.executable, ending_script.__file__, path, str(port), ending],
        env={**os.environ, "PYTHONPATH": project},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert script.returncode == (1 if ending == "by the error" else 0), script.stderr
    expected = SaveCalls(Coordination(1, 3, "", 0, ending_script.JOB, ending_script.SERIES)).new(path)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    assert "rank 1 gave up: CheckpointProcessError" in str(outcome_in(store, expected).reason)
    del server
    first.close()
