"""Directories of local storage: renamed without taking anybody's place, removed with nothing but debris in them."""

import errno
import os
from pathlib import Path

import pytest
from tests.storage.recording import RecordingFileOps

from lastgood.errors import CheckpointExistsError, StorageError
from lastgood.storage.local import LocalStorage


def test_a_rename_is_durable_before_it_returns(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    (tmp_path / "old").mkdir()
    LocalStorage(ops).rename(str(tmp_path / "old"), str(tmp_path / "new"))
    assert ops.names()[-2:] == ["rename_without_replacing", "fsync_directory"]
    assert ops.calls[-1].path == str(tmp_path)


def test_a_rename_does_not_take_the_name_of_an_empty_directory(tmp_path: Path) -> None:
    """Which the system's plain rename would: it may be one that a save is about to write into."""
    for name in ("old", "empty"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointExistsError):
        LocalStorage().rename(str(tmp_path / "old"), str(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_no_rename_refuses_a_taken_name_a_directory_is_still_not_replaced(tmp_path: Path, number: int) -> None:
    ops = RecordingFileOps()
    ops.fail("rename_without_replacing", number)
    storage = LocalStorage(ops)
    for name in ("old", "taken"):
        storage.put(str(tmp_path / name / "file"), name.encode())
    (tmp_path / "plain").write_bytes(b"plain")
    for taken in ("taken", "plain"):
        with pytest.raises(CheckpointExistsError):
            storage.rename(str(tmp_path / "old"), str(tmp_path / taken))
    assert (tmp_path / "taken" / "file").read_bytes() == b"taken"
    assert (tmp_path / "plain").read_bytes() == b"plain"
    storage.rename(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (tmp_path / "new" / "file").read_bytes() == b"old"


def test_a_rename_that_fails_says_what_is_safe(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    ops.fail("rename_without_replacing", errno.EACCES)
    (tmp_path / "old").mkdir()
    with pytest.raises(StorageError, match="It has its old name"):
        LocalStorage(ops).rename(str(tmp_path / "old"), str(tmp_path / "new"))
    assert (tmp_path / "old").is_dir()


def test_a_directory_goes_with_what_dead_writers_left_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    directory.mkdir()
    (directory / ".checkpoint_0.pt.0123456789abcdef.tmp").write_bytes(b"half")
    (directory / ".checkpoint_0.pt.lock").touch()
    assert LocalStorage().delete_directory(str(directory))
    assert not directory.exists()


def test_what_is_not_ours_keeps_a_directory_and_its_debris(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    directory.mkdir()
    names = {".checkpoint_0.pt.0123456789abcdef.tmp", ".checkpoint_0.pt.lock", "notes.txt"}
    for name in names:
        (directory / name).touch()
    assert not LocalStorage().delete_directory(str(directory))
    assert set(os.listdir(directory)) == names
    assert not LocalStorage().delete_directory(str(directory / "notes.txt"))


def test_somebody_who_puts_a_file_there_at_the_last_moment_keeps_it(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    directory = tmp_path / "step-1"
    directory.mkdir()

    def remove(real, path: str) -> None:  # type: ignore[no-untyped-def]
        (directory / "checkpoint_0.pt").write_bytes(b"new")
        real(path)

    ops.replace_call("remove_directory", remove)
    assert not LocalStorage(ops).delete_directory(str(directory))
    assert (directory / "checkpoint_0.pt").read_bytes() == b"new"


def test_a_lock_is_taken_although_the_empty_directory_is_removed_meanwhile(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    directory = tmp_path / "step-1"
    directory.mkdir()
    removed = []

    def open_exclusive(real, path: str) -> int:  # type: ignore[no-untyped-def]
        if not removed:
            removed.append(path)
            directory.rmdir()
        return int(real(path))

    ops.replace_call("open_exclusive", open_exclusive)
    lock = LocalStorage(ops).try_lock(str(directory / "checkpoint_0.pt"))
    assert lock is not None
    assert removed
    assert directory.is_dir()
    lock.release()


def test_appending_goes_on_after_a_short_write_and_an_interrupt(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    behaviours = iter(["interrupt", "short", "short"])

    def pwrite(real, descriptor: int, data: memoryview, offset: int) -> int:  # type: ignore[no-untyped-def]
        behaviour = next(behaviours, "whole")
        if behaviour == "interrupt":
            raise InterruptedError
        return int(real(descriptor, data[:1] if behaviour == "short" else data, offset))

    ops.replace_call("pwrite", pwrite)
    LocalStorage(ops).append(str(tmp_path / "log"), b"a line\n")
    assert (tmp_path / "log").read_bytes() == b"a line\n"


def test_appending_ends_where_nothing_more_is_written(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    ops.replace_call("pwrite", lambda real, descriptor, data, offset: 0)
    with pytest.raises(StorageError, match="wrote nothing") as caught:
        LocalStorage(ops).append(str(tmp_path / "log"), b"a line\n")
    assert caught.value.errno == errno.EIO
