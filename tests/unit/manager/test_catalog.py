"""What counts as a checkpoint, from what is on disk alone."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.helpers.saves import commit_together

from lastgood import make_sync_checkpointer
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.format.manifest import rank_of
from lastgood.manager.catalog import Condition, is_set_aside, read_catalog, step_name, step_of
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo


def save(path: Path, **noted: object) -> None:
    make_sync_checkpointer().save(str(path), {"w": torch.ones(3)}, **noted)


def independent(path: Path, rank: int, world_size: int) -> None:
    CheckpointWriter(CheckpointWriterConfig(), RankInfo(rank, world_size)).write(str(path), {"w": torch.ones(rank + 1)})


@pytest.mark.parametrize("step", [0, 7, 10**17])
def test_a_step_has_one_name_and_a_name_one_step(step: int) -> None:
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        "step-100.backup",
        "step-007",
        "step--1",
        "Step-5",
        "step-5 ",
        "step-",
        "step-1\n",
        "xstep-1",
        "step-\u0661",
        "step_1",
    ],
)
def test_names_that_are_not_exactly_ours_are_not_ours(name: str) -> None:
    assert step_of(name) is None


def test_names_of_rank_files_and_of_what_was_set_aside() -> None:
    names = ("checkpoint_0.pt", "checkpoint_12.pt", "checkpoint_01.pt", "checkpoint_1.pt~")
    assert [rank_of(name) for name in names] == [0, 12, None, None]
    assert is_set_aside("step-5.set-aside")
    assert is_set_aside("step-5.set-aside-2")
    assert not is_set_aside("step-5.set-asides")


def test_each_condition_is_told_from_the_others(tmp_path: Path) -> None:
    save(tmp_path / "step-1", step=1, saved_at=100.5, metrics={"loss": 0.5, "worst": float("nan")})
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-3").mkdir()
    torch.save({"w": torch.ones(3)}, tmp_path / "step-3" / "checkpoint_0.pt")
    save(tmp_path / "step-4")
    data = bytearray((tmp_path / "step-4" / "checkpoint_0.pt").read_bytes())
    data[data.index(b'"save_id"') + 14] ^= 1
    (tmp_path / "step-4" / "checkpoint_0.pt").write_bytes(data)
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "checkpoint_0.pt").mkdir()
    (tmp_path / "step-6").write_text("a file of this name")
    (tmp_path / "step-007").mkdir()
    (tmp_path / "notes.txt").touch()
    catalog = read_catalog(LocalStorage(), str(tmp_path))
    assert [(entry.step, entry.condition) for entry in catalog.entries] == [
        (1, Condition.COMMITTED),
        (2, Condition.UNFINISHED),
        (3, Condition.FOREIGN),
        (4, Condition.DAMAGED),
        (5, Condition.UNREADABLE),
    ]
    assert catalog.others == ("notes.txt", "step-007", "step-6")
    assert all(entry.problem for entry in catalog.entries if not entry.is_committed)
    first = catalog.entry(1)
    assert first is not None
    assert (first.world_size, first.saved_at, first.metrics) == (1, 100.5, {"loss": 0.5, "worst": None})
    assert first.nbytes == (tmp_path / "step-1" / "checkpoint_0.pt").stat().st_size
    assert catalog.entry(99) is None
    assert [entry.step for entry in catalog.committed] == [1]


def test_independent_files_count_when_all_are_there(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    for rank, expected in ((2, Condition.UNFINISHED), (0, Condition.UNFINISHED), (1, Condition.COMMITTED)):
        independent(path, rank, 3)
        entry = read_catalog(LocalStorage(), str(tmp_path)).entries[0]
        assert entry.condition is expected
    assert entry.nbytes == sum(file.stat().st_size for file in path.iterdir())


def test_a_root_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    catalog = read_catalog(LocalStorage(), str(tmp_path / "nowhere"))
    assert (catalog.entries, catalog.others) == ((), ())


def test_files_of_several_ranks_count_by_their_manifest(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    assert commit_together(path, 1) == [None, None]

    def condition() -> tuple[Condition, str | None]:
        entry = read_catalog(LocalStorage(), str(tmp_path)).entries[0]
        return entry.condition, entry.problem

    entry = read_catalog(LocalStorage(), str(tmp_path)).entries[0]
    assert (entry.condition, entry.world_size) == (Condition.COMMITTED, 2)
    assert entry.nbytes == sum(file.stat().st_size for file in path.glob("checkpoint_*.pt"))

    manifest, first, second = (path / name for name in ("manifest.json", "checkpoint_0.pt", "checkpoint_1.pt"))
    contents = {file: file.read_bytes() for file in (manifest, first, second)}
    for change, expected, said in (
        (lambda: manifest.unlink(), Condition.UNFINISHED, "no manifest"),
        (lambda: manifest.write_bytes(b"{}"), Condition.DAMAGED, "manifest.json is damaged"),
        (lambda: second.unlink(), Condition.DAMAGED, "ranks 1"),
        (lambda: first.unlink(), Condition.DAMAGED, "rank 0"),
        (lambda: first.write_bytes(contents[second]), Condition.DAMAGED, "not the one that its manifest names"),
        (lambda: torch.save({}, first), Condition.DAMAGED, "lastgood did not write"),
    ):
        change()
        found, problem = condition()
        assert found is expected
        assert said in str(problem)
        for file, data in contents.items():
            file.write_bytes(data)
        assert condition() == (Condition.COMMITTED, None)


def test_one_ranks_file_under_the_name_of_another_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    for rank in (0, 1):
        independent(path, rank, 2)
    (path / "checkpoint_0.pt").write_bytes((path / "checkpoint_1.pt").read_bytes())
    entry = read_catalog(LocalStorage(), str(tmp_path)).entries[0]
    assert entry.condition is Condition.DAMAGED
    assert "written by rank 1" in str(entry.problem)


def test_a_copy_of_another_step_is_no_checkpoint_of_this_one(tmp_path: Path) -> None:
    """A run that went on from it would count its steps wrongly, and retention would take it for newer than it is."""
    save(tmp_path / "step-5", step=5)
    shutil.copytree(tmp_path / "step-5", tmp_path / "step-9")
    save(tmp_path / "step-6")  # by a program that says no step: its directory's name is believed
    catalog = read_catalog(LocalStorage(), str(tmp_path))
    assert [(entry.step, entry.condition) for entry in catalog.entries] == [
        (5, Condition.COMMITTED),
        (6, Condition.COMMITTED),
        (9, Condition.MISPLACED),
    ]
    assert "it is the checkpoint of step 5" in str(catalog.entries[2].problem)
