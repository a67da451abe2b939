"""Several ranks, each a process: they resume from the same step, commit together, and end together."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import contents
from tests.helpers.workers import Together, Worker
from tests.manager import ranks
from tests.manager.runs import damage, directories, file_of, logged, make_run

from lastgood.errors import LastgoodError, RankMismatchError
from lastgood.manager.catalog import RUN_LOG_NAME
from lastgood.manager.run_log import RemoveRecord, RestoreRecord, RunRecord, SaveRecord, SetAsideRecord


class Job(Together):
    """The ranks of one process group, each with a manager when it is to have one."""

    def __init__(self, world_size: int, rendezvous: Path) -> None:
        super().__init__([Worker() for _ in range(world_size)])
        for rank, worker in enumerate(self.workers):
            worker.start(ranks.join, rank, world_size, str(rendezvous))
        self.results()

    @contextmanager
    def managing(self, root: Path, *arguments: Any) -> Iterator[None]:
        self.call(ranks.open_manager, str(root), *arguments)
        try:
            yield
        finally:
            self.call(ranks.close_manager)


@pytest.fixture(scope="module", params=[2, 3])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    job = Job(request.param, tmp_path_factory.mktemp("rendezvous") / "file")
    yield job
    job.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    job = Job(2, tmp_path_factory.mktemp("rendezvous") / "file")
    yield job
    job.kill()


@pytest.fixture(scope="module")
def saved(two: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps 10 and 20 of two ranks."""
    root = tmp_path_factory.mktemp("saved")
    with two.managing(root):
        two.call(ranks.save, [10, 20])
    (root / RUN_LOG_NAME).unlink()
    return root


def test_hazard_22_damage_of_any_ranks_file_lets_all_ranks_fall_back_to_the_same_step(job: Job, tmp_path: Path) -> None:
    world_size = len(job.workers)
    with job.managing(tmp_path):
        assert job.call(ranks.resume) == [(None, 987_654, [])] * world_size
        assert job.call(ranks.save, [10, 20, 30]) == [[10, 20, 30]] * world_size
    assert sorted(path.name for path in (tmp_path / "step-30").iterdir()) == [
        *(f"checkpoint_{rank}.pt" for rank in range(world_size)),
        "manifest.json",
    ]
    assert [record.world_size for record in logged(tmp_path, RunRecord)] == [world_size]
    assert [(record.step, record.outcome) for record in logged(tmp_path, SaveRecord)] == [
        (step, "durable") for step in (10, 20, 30)
    ]
    for damaged in range(world_size):
        root = tmp_path / f"run-{damaged}"
        for step in (10, 20, 30):
            shutil.copytree(tmp_path / f"step-{step}", root / f"step-{step}")
        damage(file_of(root, 30, damaged))
        bytes_before = contents(root / "step-30")
        with job.managing(root):
            assert job.call(ranks.resume) == [(20, 20 + rank, [(30, True)]) for rank in range(world_size)]
            # Its step is free again.
            assert job.call(ranks.save, [30]) == [[10, 20, 30]] * world_size
            assert job.call(ranks.resume) == [(30, 30 + rank, []) for rank in range(world_size)]
        assert contents(root / "step-30.set-aside") == bytes_before
        assert [record.name for record in logged(root, SetAsideRecord)] == ["step-30.set-aside"]
        assert [record.step for record in logged(root, RestoreRecord)] == [20, 30]


def _lose_rank_1(path: Path) -> None:
    (path / "checkpoint_1.pt").unlink()


def _lose_rank_0(path: Path) -> None:
    (path / "checkpoint_0.pt").unlink()


def _swap(path: Path) -> None:
    (path / "checkpoint_0.pt").rename(path / "x")
    (path / "checkpoint_1.pt").rename(path / "checkpoint_0.pt")
    (path / "x").rename(path / "checkpoint_1.pt")


def _copy_rank_1(path: Path) -> None:
    shutil.copy(path / "checkpoint_1.pt", path / "checkpoint_0.pt")


def _of_another_save(path: Path) -> None:
    shutil.copy(path.parent / "step-10" / "checkpoint_1.pt", path / "checkpoint_1.pt")


def _another_manifest(path: Path) -> None:
    shutil.copy(path.parent / "step-10" / "manifest.json", path / "manifest.json")


def _cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 50)


def _flip_manifest(path: Path) -> None:
    data = (path / "manifest.json").read_bytes()
    at = data.index(b"save_id") + 14
    (path / "manifest.json").write_bytes(data[:at] + (b"0" if data[at] != ord("0") else b"1") + data[at + 1 :])


def _empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")


@pytest.mark.parametrize(
    "ruin",
    [
        _lose_rank_1,
        _lose_rank_0,
        _swap,
        _copy_rank_1,
        _of_another_save,
        _another_manifest,
        _cut_manifest,
        _flip_manifest,
        _empty_manifest,
    ],
)
def test_hazard_22_whatever_is_wrong_with_the_files_of_ranks_all_fall_back(
    two: Job, saved: Path, tmp_path: Path, ruin: Callable[[Path], None]
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    ruin(tmp_path / "step-20")
    before = contents(tmp_path / "step-20")
    with two.managing(tmp_path):
        assert two.call(ranks.resume) == [(10, 10 + rank, [(20, True)]) for rank in range(2)]
        assert two.call(ranks.resume) == [(10, 10 + rank, []) for rank in range(2)]
    assert contents(tmp_path / "step-20.set-aside") == before


def test_hazard_22_a_save_without_a_manifest_is_passed_over_and_left_alone(
    two: Job, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step-20" / "manifest.json").unlink()
    before = contents(tmp_path / "step-20")
    with two.managing(tmp_path, 1):
        assert two.call(ranks.resume) == [(10, 10 + rank, [(20, False)]) for rank in range(2)]
        assert two.call(ranks.save, [30])[0] == [30]
        # Files of ranks may be all that somebody has: only `lastgood prune` takes them.
        assert contents(tmp_path / "step-20") == before
        assert directories(tmp_path) == ["step-20", "step-30"]


def test_old_ones_are_removed_by_rank_0_once_the_new_one_is_committed_by_all(two: Job, tmp_path: Path) -> None:
    with two.managing(tmp_path, 2):
        assert two.call(ranks.save, [10, 20, 30, 40])[0] == [30, 40]
        assert directories(tmp_path) == ["step-30", "step-40"]
        assert two.call(ranks.set_aside, 40) == [[30]] * 2
        assert two.call(ranks.resume) == [(30, 30 + rank, []) for rank in range(2)]
        assert two.call(ranks.resume, 30) == [(30, 30 + rank, []) for rank in range(2)]
    assert [[gone.step for gone in record.removed] for record in logged(tmp_path, RemoveRecord)] == [[10], [20]]


def test_a_checkpoint_of_one_rank_is_resumed_from_by_two(two: Job, tmp_path: Path) -> None:
    make_run(tmp_path, [10])
    with two.managing(tmp_path):
        assert two.call(ranks.resume) == [(10, 10, [])] * 2


def test_what_three_ranks_hold_each_for_itself_two_ranks_do_not_get_without_a_rule(two: Job, tmp_path: Path) -> None:
    three = Job(3, tmp_path / "rendezvous")
    try:
        with three.managing(tmp_path):
            three.call(ranks.save, [10])
    finally:
        three.kill()
    before = contents(tmp_path / "step-10")
    with two.managing(tmp_path):
        for told in two.call(ranks.resume_and_tell):
            assert told.startswith((RankMismatchError.__name__, LastgoodError.__name__))
            assert "saved by 3 ranks" in told
            assert "per_rank=" in told
    assert contents(tmp_path / "step-10") == before


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["shape", "key", "object"])
def test_hazard_26_a_load_that_fails_on_one_rank_fails_on_all(two: Job, tmp_path: Path, how: str, failing: int) -> None:
    """A rank that went on alone would wait for the others in the next step, until its time-out."""
    with two.managing(tmp_path):
        two.call(ranks.save_object if how == "object" else ranks.save, 10 if how == "object" else [10])
        told = two.call(ranks.fail_to_resume, how, failing)
        error, word = {
            "shape": ("TargetMismatchError", "model.weights"),
            "key": ("MissingKeysError", "model.missing"),
            "object": ("ValueError", "does not like"),
        }[how]
        assert told[failing].startswith(error)
        assert told[1 - failing].startswith(f"LastgoodError: rank {failing} cannot")
        assert word in told[1 - failing]
        # And they go on together.
        assert two.call(ranks.save, [20]) == [[10, 20]] * 2


@pytest.mark.parametrize(("number", "asynchronous"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_signal_to_one_rank_preempts_all_at_the_same_step_whose_save_is_committed(
    two: Job, tmp_path: Path, number: signal.Signals, asynchronous: bool
) -> None:
    for worker in two.workers:
        worker.start(ranks.train_until_preempted, str(tmp_path), asynchronous, with_pipe=True)

    def make_a_step() -> None:
        for worker in two.workers:
            assert worker.receive() == "ready"
        for worker in two.workers:
            worker._pipe.send("step")

    make_a_step()
    make_a_step()
    for worker in two.workers:
        assert worker.receive() == "ready"
    os.kill(two.workers[1].pid, number)
    for worker in two.workers:
        worker._pipe.send("step")
    assert two.results() == [(3, True, True, [3])] * 2
    assert "manifest.json" in contents(tmp_path / "step-3")


def test_hazard_26_after_a_save_that_failed_on_one_rank_all_ranks_save_together_again(two: Job, tmp_path: Path) -> None:
    """Nobody waits for ten minutes, and nobody is one save behind the others from then on."""
    two.call(ranks.open_asynchronous_manager, str(tmp_path))
    try:
        two.call(ranks.save, [10])
        for how, told in (
            ("metrics", "ConfigError"),
            ("object", "this rank does not give its state"),
            ("unsupported", "UnsupportedStateError"),
        ):
            outcomes = two.call(ranks.save_and_fail, 20, how, 1)
            assert told in outcomes[1]
            assert "rank 1" in outcomes[0]
            assert told in outcomes[0]
        # A process that has died meanwhile is no failure: there is another one.
        assert two.call(ranks.save_and_fail, 20, "killed", 1) == ["saved", "saved"]
        assert two.call(ranks.save_and_fail, 30, "killed", 0) == ["saved", "saved"]
        assert two.call(ranks.save, [40]) == [[10, 20, 30, 40]] * 2
        assert two.call(ranks.resume) == [(40, 40 + rank, []) for rank in range(2)]
    finally:
        two.call(ranks.close_manager)


def test_a_manager_of_several_ranks_has_no_use_for_a_barrier(two: Job, tmp_path: Path) -> None:
    for told in two.call(ranks.open_manager_with_a_barrier, str(tmp_path)):
        assert told.startswith("ConfigError")
        assert "leave barrier_config out" in told


def test_hazard_29_a_job_that_resumes_shuts_out_the_one_before_it(
    two: Job, saved: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Which may still run, on a machine that was cut off."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    other = Job(2, tmp_path_factory.mktemp("rendezvous") / "file")
    try:
        two.call(ranks.open_manager, str(tmp_path))
        assert two.call(ranks.save, [30]) == [[10, 20, 30]] * 2
        with other.managing(tmp_path):
            assert other.call(ranks.resume) == [(30, 30 + rank, []) for rank in range(2)]
            for told in two.call(ranks.save_after, 40):
                assert "another job has taken over" in told
            for told in two.call(ranks.resume_and_tell):
                assert "another job has taken over" in told
            assert other.call(ranks.save, [40]) == [[10, 20, 30, 40]] * 2
        for told in two.call(ranks.close_and_tell):  # a failure that no later save made good
            assert "another job has taken over" in told
    finally:
        other.kill()
