"""The lock beside a file: between processes, after a death, where there are none, and in its narrow places."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.workers import Worker
from tests.storage.recording import RecordingFileOps

from lastgood.errors import StorageError
from lastgood.storage._file_lock import lock_file, try_file_lock
from lastgood.storage.base import StorageLock
from lastgood.storage.local import LocalStorage

_of_this_process: list[StorageLock] = []


def take(path: str) -> bool:
    """In a process of a test's: whether it has the lock now."""
    lock = LocalStorage().try_lock(path)
    if lock is not None:
        _of_this_process.append(lock)
    return lock is not None


def give_back() -> None:
    _of_this_process.pop().release()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    workers = [Worker(), Worker()]
    yield workers
    for worker in workers:
        worker.kill()


@pytest.fixture
def ops() -> RecordingFileOps:
    return RecordingFileOps()


def has(lock: StorageLock | None) -> StorageLock:
    assert lock is not None
    return lock


def test_one_of_two_processes_has_it_and_then_the_other(workers: list[Worker], tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    first, second = workers
    assert first.call(take, path)
    assert not second.call(take, path)
    assert second.call(take, str(tmp_path / "another file"))
    assert LocalStorage().try_lock(path) is None
    first.call(give_back)
    assert second.call(take, path)
    assert not first.call(take, path)
    second.call(give_back)
    second.call(give_back)
    assert os.listdir(tmp_path) == []


def test_death_frees_it_and_what_is_left_behind_is_taken_over_and_removed(
    workers: list[Worker], tmp_path: Path
) -> None:
    path = str(tmp_path / "file")
    first, second = workers
    assert first.call(take, path)
    assert not second.call(take, path)
    first.kill()
    assert os.listdir(tmp_path) == [".file.lock"]
    assert LocalStorage().list(str(tmp_path)) == []
    left_behind = os.stat(tmp_path / ".file.lock").st_ino
    assert second.call(take, path)
    assert os.stat(tmp_path / ".file.lock").st_ino == left_behind
    assert LocalStorage().try_lock(path) is None
    second.call(give_back)
    assert os.listdir(tmp_path) == []


def test_a_copy_of_the_holder_by_fork_does_not_keep_it_locked(tmp_path: Path) -> None:
    """A worker of a DataLoader, started during a save, has all descriptors of its trainer."""
    path = str(tmp_path / "file")
    lock = has(LocalStorage().try_lock(path))
    reader, writer = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            os.close(writer)
            os.read(reader, 1)  # until the test is over
        finally:
            os._exit(0)
    os.close(reader)
    try:
        assert LocalStorage().try_lock(path) is None
        lock.release()
        has(LocalStorage().try_lock(path)).release()
    finally:
        os.close(writer)
        os.waitpid(copy, 0)
    assert os.listdir(tmp_path) == []


def test_names_like_those_of_locks_are_files_like_any_others(tmp_path: Path) -> None:
    storage = LocalStorage()
    for name in ("file.lock", ".lock.file", "lock"):
        storage.put(str(tmp_path / name), b"data")
    assert storage.list(str(tmp_path)) == [".lock.file", "file.lock", "lock"]


# File systems without locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_there_are_no_locks_nobody_is_kept_from_saving(
    ops: RecordingFileOps, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    ops.fail("lock", number)
    with caplog.at_level(logging.INFO, "lastgood"):
        locks = [has(try_file_lock(ops, str(tmp_path / "file"))) for _ in range(2)]  # type: ignore[arg-type]
    assert "not kept apart" in caplog.text
    assert os.listdir(tmp_path) == []
    for lock in locks:
        lock.release()
        lock.release()
    assert len(ops.of("close")) == len(ops.of("open_exclusive"))


def test_a_lock_that_fails_for_the_moment_is_an_error_and_takes_no_file_from_its_holder(tmp_path: Path) -> None:
    holder = has(LocalStorage().try_lock(str(tmp_path / "file")))
    before = os.listdir(tmp_path)
    ops = RecordingFileOps()
    ops.fail("lock", errno.EIO)
    with pytest.raises(StorageError):
        LocalStorage(ops).try_lock(str(tmp_path / "file"))  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == before
    assert len(ops.of("close")) == 1
    holder.release()


def test_a_directory_where_no_lock_can_be_made_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(StorageError, match="a file, not a directory"):
        LocalStorage().try_lock(str(tmp_path / "notes" / "file"))
    ops = RecordingFileOps()
    ops.fail("open_exclusive", errno.EROFS)
    with pytest.raises(StorageError) as caught:
        LocalStorage(ops).try_lock(str(tmp_path / "file"))  # type: ignore[arg-type]
    assert (caught.value.errno, caught.value.phase) == (errno.EROFS, "lock")


def test_a_lock_file_that_cannot_be_removed_is_left_to_the_next_holder(
    ops: RecordingFileOps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "file")
    lock = has(try_file_lock(ops, path))  # type: ignore[arg-type]
    ops.fail("unlink", errno.EACCES)
    lock.release()
    assert "the next save of this name will" in caplog.text
    assert os.listdir(tmp_path) == [".file.lock"]
    has(LocalStorage().try_lock(path)).release()
    assert os.listdir(tmp_path) == []


# Narrow places: what another does between two steps of ours


def before(ops: RecordingFileOps, name: str, once: Callable[[], object]) -> None:
    """Call ``once`` before the next operation of that name."""

    def operation(real: Callable[..., Any], *arguments: Any) -> Any:
        ops.heal(name)
        once()
        return real(*arguments)

    ops.replace_call(name, operation)


def test_a_lock_file_removed_before_we_lock_it_is_not_taken_for_one(ops: RecordingFileOps, tmp_path: Path) -> None:
    """Our lock would lie on a file without a name, and another's on a new one."""
    path = str(tmp_path / "file")
    other = has(LocalStorage().try_lock(path))
    before(ops, "lock", other.release)
    lock = has(try_file_lock(ops, path))  # type: ignore[arg-type]
    assert len(ops.of("lock")) == 2
    assert LocalStorage().try_lock(path) is None
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_file_replaced_before_we_lock_it_is_anothers(ops: RecordingFileOps, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    former = has(LocalStorage().try_lock(path))
    latter: list[StorageLock] = []

    def change_hands() -> None:
        former.release()
        latter.append(has(LocalStorage().try_lock(path)))

    before(ops, "lock", change_hands)
    assert try_file_lock(ops, path) is None  # type: ignore[arg-type]
    assert os.path.exists(lock_file(path))
    latter[0].release()
    assert os.listdir(tmp_path) == []
    assert len(ops.of("close")) == 2


def test_a_lock_file_removed_before_we_open_it_is_made_anew(ops: RecordingFileOps, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    other = has(LocalStorage().try_lock(path))
    before(ops, "open_write", other.release)
    lock = has(try_file_lock(ops, path))  # type: ignore[arg-type]
    assert LocalStorage().try_lock(path) is None
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_another_locks_before_its_maker_is_that_others(ops: RecordingFileOps, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    other: list[StorageLock] = []
    before(ops, "lock", lambda: other.append(has(LocalStorage().try_lock(path))))
    assert try_file_lock(ops, path) is None  # type: ignore[arg-type]
    other[0].release()
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_is_always_taken_away_ends_in_no_lock_and_not_in_a_hang(
    ops: RecordingFileOps, tmp_path: Path
) -> None:
    path = str(tmp_path / "file")

    def take_away(real: Callable[[int], bool], descriptor: int) -> bool:
        os.unlink(lock_file(path))
        return real(descriptor)

    ops.replace_call("lock", take_away)
    assert try_file_lock(ops, path) is None  # type: ignore[arg-type]
    assert len(ops.of("close")) == len(ops.of("open_exclusive"))
