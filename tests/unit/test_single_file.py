"""``lastgood.save`` and ``lastgood.load``: one file in the place of ``torch.save`` and ``torch.load``."""

import errno
import io
import os
import pathlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.saves import assert_state, contents, state_of

import lastgood
from lastgood.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    MissingKeysError,
    StorageError,
    TargetMismatchError,
    UnsupportedStateError,
)
from lastgood.storage.file_ops import OsFileOps


class OwnPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, OwnPath])
def test_paths_of_every_kind(tmp_path: Path, kind: Any) -> None:
    file = kind(tmp_path / "state.pt")
    assert lastgood.save(state_of(1), file) is None
    assert_state(lastgood.load(file), 1)
    assert_state(torch.load(tmp_path / "state.pt", weights_only=True), 1)


def test_a_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lastgood.save(state_of(1), "state.pt")
    assert_state(lastgood.load("state.pt"), 1)
    assert os.listdir(tmp_path) == ["state.pt"]


def test_missing_directories_are_made(tmp_path: Path) -> None:
    lastgood.save(state_of(1), tmp_path / "a" / "b" / "state.pt")
    assert list(contents(tmp_path)) == ["a/b/state.pt"]


@pytest.mark.parametrize(
    "value", [torch.arange(5), [torch.ones(2), 3], 7, None, "text", OrderedDict(a=torch.ones(1)), {}], ids=str
)
def test_anything_that_torch_saves_may_be_the_whole(tmp_path: Path, value: Any) -> None:
    lastgood.save(value, tmp_path / "value.pt")
    torch.save(value, tmp_path / "torch.pt")
    found = lastgood.load(tmp_path / "value.pt")
    assert type(found) is type(value)
    assert str(found) == str(torch.load(tmp_path / "torch.pt", weights_only=True)) == str(value)


def test_an_existing_file_is_replaced_in_one_step_and_readers_of_it_keep_it(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    lastgood.save(state_of(1), file)
    mapped = lastgood.load(file, mmap=True)
    inode = file.stat().st_ino
    lastgood.save(state_of(2), file)
    assert file.stat().st_ino != inode
    assert_state(mapped, 1)
    assert_state(lastgood.load(file), 2)
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("not_a_path", [io.BytesIO(), None, 3, b"state.pt"], ids=lambda value: type(value).__name__)
def test_buffers_and_other_things_are_refused_with_a_reason(not_a_path: Any) -> None:
    for call in (lambda: lastgood.save({}, not_a_path), lambda: lastgood.load(not_a_path)):
        with pytest.raises(ConfigError, match=rf"from a {type(not_a_path).__name__}: only a named file can be"):
            call()


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"state.pt"


@pytest.mark.parametrize("path", ["", "a\0b", BytesPath()])
def test_paths_that_cannot_be(path: Any) -> None:
    for call in (lambda: lastgood.save({}, path), lambda: lastgood.load(path)):
        with pytest.raises(ConfigError):
            call()


def test_a_directory_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    with pytest.raises(StorageError, match="the name belongs to a directory") as caught:
        lastgood.save(state_of(1), tmp_path)
    assert caught.value.errno == errno.EISDIR
    assert contents(tmp_path) == {"kept": b"kept"}
    with pytest.raises((StorageError, CheckpointNotFoundError)) as loading:
        lastgood.load(tmp_path)
    assert str(tmp_path) in str(loading.value)


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StorageError, match=r"/file is a file, not a directory.*untouched"):
        lastgood.save(state_of(1), tmp_path / "file" / "state.pt")
    assert contents(tmp_path) == {"file": b"kept"}
    with pytest.raises(CheckpointNotFoundError):
        lastgood.load(tmp_path / "file" / "state.pt")


def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's refusal, which root does not get: the real one is in tests/crash/test_small_disk.py."""

    def refuse(self: OsFileOps, path: str) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    lastgood.save(state_of(1), tmp_path / "state.pt")
    monkeypatch.setattr(OsFileOps, "open_exclusive", refuse)
    with pytest.raises(StorageError, match=r"permission denied.*untouched") as caught:
        lastgood.save(state_of(2), tmp_path / "state.pt")
    assert caught.value.errno == errno.EACCES
    assert isinstance(caught.value.__cause__, PermissionError)
    assert_state(lastgood.load(tmp_path / "state.pt"), 1)


def test_a_value_that_cannot_be_saved_leaves_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    lastgood.save(state_of(1), file)
    with pytest.raises(UnsupportedStateError, match="loader") as caught:
        lastgood.save({"data": {"loader": (value for value in ())}}, file)
    assert caught.value.tensor == "data.loader"
    assert_state(lastgood.load(file), 1)
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("operation", ["fsync", "replace", "fsync_directory"])
def test_a_failure_of_storage_leaves_no_temporary(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "state.pt"
    lastgood.save(state_of(1), file)
    real = getattr(OsFileOps, operation)

    def fail(self: OsFileOps, *arguments: Any) -> Any:
        # The parent of the directory is fsynced before anything is written.
        if operation == "fsync_directory" and arguments[0] != str(file.parent):
            return real(self, *arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(OsFileOps, operation, fail)
    with pytest.raises(StorageError, match="I/O error"):
        lastgood.save(state_of(2), file)
    assert os.listdir(file.parent) == ["state.pt"]
    # Once the name is changed nothing can be taken back: the error says so.
    assert_state(lastgood.load(file), 2 if operation == "fsync_directory" else 1)


# Loading: what is particular to single files


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        lastgood.load(tmp_path / "state.pt")
    assert isinstance(caught.value, FileNotFoundError)
    assert str(tmp_path / "state.pt") in str(caught.value)


def test_into_a_target_and_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    lastgood.save(state_of(1), file)
    weights = torch.zeros(50_000)
    target = {"model": {"weights": weights, "scale": None}, "step": 0}
    assert lastgood.load(file, target) is target
    assert target["model"]["weights"] is weights
    assert torch.equal(weights, state_of(1)["model"]["weights"])
    assert target["step"] == 1
    with pytest.raises(MissingKeysError, match=r"model\.scale") as caught:
        lastgood.load(file, {"model": {"scale": None}}, strict=True)
    assert caught.value.missing_keys == ("model.scale",)
    with pytest.raises(TargetMismatchError, match=r"model\.weights"):
        lastgood.load(file, {"model": {"weights": torch.zeros(3)}})


def test_a_rank_of_a_checkpoint_and_a_file_of_torch_load_too(tmp_path: Path) -> None:
    lastgood.make_sync_checkpointer().save(str(tmp_path / "step"), state_of(1))
    assert_state(lastgood.load(tmp_path / "step" / "checkpoint_0.pt"), 1)
    torch.save(state_of(2), tmp_path / "torch.pt")
    assert_state(lastgood.load(tmp_path / "torch.pt"), 2)


def test_a_flipped_bit_is_reported_unless_nobody_wants_to_know(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    lastgood.save({"w": torch.zeros(100_000)}, file)
    data = bytearray(file.read_bytes())
    data[200_000] ^= 1
    file.write_bytes(data)
    for options in ({}, {"target": {"w": torch.zeros(100_000)}}, {"verify_first": True}):
        with pytest.raises(CorruptCheckpointError, match="'w'") as caught:
            lastgood.load(file, **options)  # type: ignore[arg-type]
        assert caught.value.tensor == "w"
    assert torch.count_nonzero(lastgood.load(file, verify=False)["w"]) == 1


def test_map_location(tmp_path: Path) -> None:
    lastgood.save({"w": torch.ones(4)}, tmp_path / "state.pt")
    assert lastgood.load(pathlib.Path(tmp_path / "state.pt"), map_location="meta")["w"].device.type == "meta"
