"""What the checkpoint reader refuses: paths that are no checkpoint, saves that were never committed or do not match."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.saves import assert_state, commit_together, read, save, state_of
from tests.unit.loading.files import FORGED_TENSOR, flip, forge

import lastgood
from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, UncommittedCheckpointError
from lastgood.format.identity import read_identity
from lastgood.format.manifest import MANIFEST_VERSION, Manifest, ManifestFile, encode_manifest
from lastgood.format.nodes import DictNode
from lastgood.storage.local import LocalStorage


def refused(path: Path, kind: type[Exception], match: str, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    reader = lastgood.CheckpointReader(lastgood.RankInfo(rank, world_size))
    for target in (None, {"model": None}):
        with pytest.raises(kind, match=match) as caught:
            reader.read(str(path), target, **options)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A checkpoint of two ranks with its manifest: rank 0 has saved state 1, rank 1 state 2."""
    path = tmp_path / "committed"
    commit_together(path, 1, 2)
    assert (path / "manifest.json").exists()
    return path


# Paths


def test_there_is_no_such_directory(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere", CheckpointNotFoundError, "no such directory")
    assert isinstance(error, FileNotFoundError)
    assert error.rank == 0
    assert error.path == str(tmp_path / "nowhere")


def test_the_path_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "single.pt"
    lastgood.save(state_of(1), file)
    refused(file, CheckpointNotFoundError, r"is a file.*lastgood\.load")


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointNotFoundError, "holds no checkpoint")


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "model.pt").write_bytes(b"x")
    refused(tmp_path, CheckpointNotFoundError, "holds no checkpoint")


def test_a_name_that_belongs_to_a_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0.pt").mkdir()
    refused(tmp_path, lastgood.StorageError, "directory")


def test_only_another_ranks_file(tmp_path: Path) -> None:
    save(tmp_path, 1, rank=1, world_size=2)
    error = refused(tmp_path, CheckpointNotFoundError, r"no file for rank 0; it holds checkpoint_1\.pt")
    assert error.rank == 0


def test_garbage_under_the_right_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0.pt").write_bytes(b"garbage")
    refused(tmp_path, CorruptCheckpointError, "damaged")


def test_unknown_arguments_are_accepted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert_state(read(tmp_path, some_option=3), 1)


# Commits


def test_a_committed_checkpoint_is_read_by_each_rank(committed: Path) -> None:
    for rank in range(2):
        assert_state(read(committed, rank, 2), 1 + rank)


def test_several_ranks_without_a_manifest_were_never_committed(committed: Path) -> None:
    (committed / "manifest.json").unlink()
    for rank in range(2):
        error = refused(committed, UncommittedCheckpointError, "never committed", rank, 2)
        assert error.rank == rank
        assert_state(read(committed, rank, 2, allow_uncommitted=True), 1 + rank)


def test_independent_ranks_need_no_manifest(tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path, 5, rank, 2)
    for rank in range(2):
        assert_state(read(tmp_path, rank, 2), 5)


def test_a_damaged_manifest(committed: Path) -> None:
    manifest = committed / "manifest.json"
    whole = manifest.read_bytes()
    damaged = [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 2)]
    damaged += [whole + b"x", b"{}", b"[" * 100_000, whole.replace(b'"size":', b'"size":1'), b"\xff" * 50]
    for data in damaged:
        manifest.write_bytes(data)
        refused(committed, CorruptCheckpointError, "manifest", 1, 2)
    for offset in range(len(whole) - 1):
        manifest.write_bytes(whole)
        flip(manifest, offset, 1 << offset % 8)
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
            read(committed, 0, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_files_of_two_saves_are_never_mixed(committed: Path, tmp_path: Path, rank: int) -> None:
    other = tmp_path / "other"
    commit_together(other, 2, 2)
    shutil.copy(other / f"checkpoint_{rank}.pt", committed / f"checkpoint_{rank}.pt")
    refused(committed, CorruptCheckpointError, "another save", rank, 2)
    assert_state(read(committed, 1 - rank, 2), 2 - rank)


def test_a_file_of_the_same_state_from_another_save_is_another_file(committed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    commit_together(other, 1, 2)
    shutil.copy(other / "checkpoint_0.pt", committed)
    refused(committed, CorruptCheckpointError, "another save", 0, 2)


@pytest.mark.parametrize("kind", ["single", "independent", "torch"])
def test_a_file_that_no_manifest_joins_is_refused_next_to_one(committed: Path, kind: str) -> None:
    file = committed / "checkpoint_1.pt"
    if kind == "torch":
        torch.save(state_of(1), file)
    else:
        world_size, independent = (1, False) if kind == "single" else (2, True)
        rank = 0 if kind == "single" else 1
        root = DictNode({"model": FORGED_TENSOR[0]})
        forge(file, root, FORGED_TENSOR[1], rank=rank, world_size=world_size, independent=independent)
    refused(committed, CorruptCheckpointError, r"checkpoint_1\.pt|manifest", 1, 2)


def test_a_renamed_file(committed: Path) -> None:
    shutil.copy(committed / "checkpoint_1.pt", committed / "checkpoint_0.pt")
    refused(committed, CorruptCheckpointError, "written by rank 1", 0, 2)
    refused(committed, CorruptCheckpointError, "is not the file that the manifest .* names", 0, 1)


def test_a_renamed_file_of_ranks_that_no_manifest_joins(tmp_path: Path) -> None:
    for rank in (0, 1):
        save(tmp_path, rank + 1, rank, 2)
    shutil.copy(tmp_path / "checkpoint_1.pt", tmp_path / "checkpoint_0.pt")
    for allowed in (False, True):
        refused(tmp_path, CorruptCheckpointError, "written by rank 1", 0, 2, allow_uncommitted=allowed)


@pytest.mark.parametrize("world_size", [0, 1, 2, 3])
def test_a_rank_outside_its_world(committed: Path, world_size: int) -> None:
    """The rank in the file fits its name, but not the number of ranks."""
    (committed / "manifest.json").unlink()
    forge(committed / "checkpoint_3.pt", DictNode({"model": 1}), rank=3, world_size=world_size)
    refused(committed, CorruptCheckpointError, "by rank 3 of", 3, 4)


def test_a_manifest_of_another_number_of_ranks(committed: Path) -> None:
    forge(committed / "checkpoint_0.pt", DictNode({"model": 1}), rank=0, world_size=3)
    refused(committed, CorruptCheckpointError, "different saves", 0, 2)
    refused(committed, CorruptCheckpointError, "another save", 0, 3)


def test_a_file_of_another_number_of_ranks_than_its_manifest_says(tmp_path: Path) -> None:
    """No writer writes such a manifest: it names the very file, whose save was of one rank."""
    save(tmp_path, 1)
    with contextlib.closing(LocalStorage().open(str(tmp_path / "checkpoint_0.pt"))) as file:
        found = read_identity(file)
    assert found is not None
    first = ManifestFile(0, "checkpoint_0.pt", found.size, found.trailer_crc, found.save_id)
    second = ManifestFile(1, "checkpoint_1.pt", 1, 0, found.save_id)
    manifest = Manifest(MANIFEST_VERSION, found.save_id, 2, [first, second])
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    refused(tmp_path, CorruptCheckpointError, "is not the file that the manifest .* names", 0, 1)


def test_nothing_is_touched_before_the_commit_is_known(committed: Path) -> None:
    (committed / "manifest.json").unlink()
    weights = torch.zeros(50_000)
    with pytest.raises(UncommittedCheckpointError):
        lastgood.CheckpointReader(lastgood.RankInfo(0, 2)).read(str(committed), {"model": {"weights": weights}})
    assert not weights.any()
