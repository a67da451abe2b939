"""Runs of sharded models: saved by some ranks, gone on with by others, by one process, and back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.manager import sharded
from tests.manager.runs import manager_of
from tests.manager.test_ranks import Job

from lastgood.errors import RankMismatchError


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Job]]:
    jobs = {size: Job(size, tmp_path_factory.mktemp("rendezvous") / "file") for size in (2, 3)}
    yield jobs
    for job in jobs.values():
        job.kill()


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("how", ["objects", "app"])
def test_a_run_goes_on_with_another_number_of_ranks(jobs: dict[int, Job], tmp_path: Path, how: str) -> None:
    saved = jobs[3].call(sharded.save, str(tmp_path), how)
    rules = {"position": "modulo"}
    for step, found, position in jobs[3].call(sharded.resume, str(tmp_path), how, None):
        assert step == 2
        assert_equal(found, saved[0])
        assert position >= 100
    for rank, (step, found, position) in enumerate(jobs[2].call(sharded.resume, str(tmp_path), how, rules)):
        assert (step, position) == (2, 100 + rank)
        assert_equal(found, saved[0])


def test_values_of_each_rank_need_a_rule_and_nothing_is_changed_without(jobs: dict[int, Job], tmp_path: Path) -> None:
    jobs[3].call(sharded.save, str(tmp_path), "objects")
    for kind, message, position in jobs[2].call(sharded.resume, str(tmp_path), "objects", None):
        assert kind in ("RankMismatchError", "LastgoodError")
        assert "position.value" in message
        assert "per_rank={'position': 'first'}" in message
        assert position == -1
    for _, _, position in jobs[2].call(sharded.resume, str(tmp_path), "objects", {"posi*": "leave"}):
        assert position == -1
    for _, _, position in jobs[2].call(sharded.resume, str(tmp_path), "objects", {"position": "first"}):
        assert position == 100


def test_one_process_without_distribution_goes_on_and_so_do_ranks_with_what_it_saved(
    jobs: dict[int, Job], tmp_path: Path
) -> None:
    saved = jobs[2].call(sharded.save, str(tmp_path / "ranks"), "objects")[0]
    model, optimizer = sharded.new_training(50, is_sharded=False)
    state = {"model": model, "optimizer": optimizer, "position": sharded.Position()}
    with manager_of(tmp_path / "ranks") as manager:
        assert manager.restore(state, per_rank={"position": "first"}) == 2
    assert_equal(sharded.whole(model.state_dict()), saved["model"])
    assert_equal(sharded.whole(optimizer.state_dict()), saved["optimizer"])
    with manager_of(tmp_path / "one") as manager:
        manager.save(7, state).result(0)
    for step, found, position in jobs[3].call(sharded.resume, str(tmp_path / "one"), "objects", None):
        assert (step, position) == (7, 100)
        assert_equal(found, saved)


def test_random_states_are_dealt_out_by_a_rule(jobs: dict[int, Job], tmp_path: Path) -> None:
    def resume(root: Path, rules: Any) -> list[Any]:
        return [each[0] for each in jobs[2].call(sharded.resume_with_random_states, str(root), rules)]

    jobs[3].call(sharded.save_with_random_states, str(tmp_path / "three"))
    assert set(resume(tmp_path / "three", None)) <= {"RankMismatchError", "LastgoodError"}
    assert resume(tmp_path / "three", {"random_states": "modulo"}) == [2, 2]
    with manager_of(tmp_path / "one", random_states=True) as manager:
        manager.save(2, {"value": 1}).result(0)
    assert set(resume(tmp_path / "one", None)) <= {"RankMismatchError", "LastgoodError"}
    assert resume(tmp_path / "one", {"random_states": "leave"}) == [2, 2]


def test_replicas_are_written_once_and_have_to_be_the_same(jobs: dict[int, Job], tmp_path: Path) -> None:
    assert jobs[3].call(sharded.save_replicas, str(tmp_path / "same"), False) == ["saved"] * 3
    sizes = [path.stat().st_size for path in sorted((tmp_path / "same" / "step-1").glob("*.pt"))]
    assert sum(sizes) < 1.02 * 1024 * 3000 * 4
    assert max(sizes) < 1.05 * min(sizes)
    for outcome in jobs[3].call(sharded.save_replicas, str(tmp_path / "drifted"), True):
        assert "model.buffer" in outcome
        assert "rank 1" in outcome
    assert not (tmp_path / "drifted" / "step-1" / "manifest.json").exists()
    with manager_of(tmp_path / "same") as manager, pytest.raises(RankMismatchError, match="own"):
        manager.restore({"model": {"weights": torch.empty(1024, 3000)}, "own": None})
    weights = torch.empty(1024, 3000)
    with manager_of(tmp_path / "same") as manager:
        manager.restore({"model": {"weights": weights}})
    torch.manual_seed(4)
    assert torch.equal(weights, torch.randn(1024, 3000))
