"""Names: how a file gets its own without taking another's, and whose temporaries are cleared."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.storage.recording import RecordingFileOps, descriptors_left_open, names_in

from lastgood.errors import CheckpointExistsError, StorageError
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import read_all


@pytest.fixture
def ops() -> RecordingFileOps:
    return RecordingFileOps()


@pytest.fixture
def storage(ops: RecordingFileOps) -> LocalStorage:
    return LocalStorage(ops)


def test_without_hard_links_a_rename_that_never_replaces_is_used(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    for number in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        ops.fail("link", number)
        path = str(tmp_path / f"file {number}")
        storage.put_if_absent(path, b"first")
        with pytest.raises(CheckpointExistsError):
            storage.put_if_absent(path, b"second")
        assert read_all(storage, path) == b"first"
    assert ops.names().count("rename_without_replacing") == 6
    assert len(names_in(tmp_path)) == 3


def test_without_any_way_not_to_replace_it_is_refused(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.fail("link", errno.EPERM)
    ops.fail("rename_without_replacing", errno.EINVAL)
    with pytest.raises(StorageError, match="neither hard links nor"):
        storage.put_if_absent(str(tmp_path / "file"), b"first")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("step", ["link", "rename_without_replacing"])
def test_a_publication_that_fails_for_another_reason_is_told_as_it_is(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path, step: str
) -> None:
    ops.fail("link", errno.EPERM)
    ops.fail(step, errno.EIO)
    with pytest.raises(StorageError, match="I/O error") as caught:
        storage.put_if_absent(str(tmp_path / "file"), b"first")
    assert caught.value.errno == errno.EIO
    assert names_in(tmp_path) == []


def test_a_link_whose_answer_was_lost_is_a_success(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def asked_twice(real: Callable[..., Any], existing: str, new: str) -> None:
        real(existing, new)
        real(existing, new)

    ops.replace_call("link", asked_twice)
    storage.put_if_absent(str(tmp_path / "file"), b"first")
    assert read_all(storage, str(tmp_path / "file")) == b"first"
    assert names_in(tmp_path) == ["file"]


def test_a_dangling_link_under_the_name_takes_it(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointExistsError):
        storage.put_if_absent(str(tmp_path / "file"), b"first")
    assert names_in(tmp_path) == ["file"]


def test_a_published_file_whose_temporary_cannot_be_removed_is_published(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.fail("unlink", errno.EIO)
    storage.put_if_absent(str(tmp_path / "file"), b"first")
    assert read_all(storage, str(tmp_path / "file")) == b"first"
    ops.heal("unlink")
    storage.put(str(tmp_path / "file"), b"second")
    assert names_in(tmp_path) == ["file"]


def test_a_temporary_cleared_between_its_creation_and_its_lock_is_made_again(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def cleared_first(real: Callable[..., Any], descriptor: int) -> bool:
        ops.heal("lock")
        LocalStorage().begin(str(tmp_path / "file"), 5).abort()
        return bool(real(descriptor))

    ops.replace_call("lock", cleared_first)
    storage.put(str(tmp_path / "file"), b"whole")
    assert ops.names().count("open_exclusive") == 2
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert names_in(tmp_path) == ["file"]
    assert not descriptors_left_open(ops)


def test_a_temporary_locked_by_somebody_who_clears_up_is_left_to_them(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def locked_by_another(real: Callable[..., Any], descriptor: int) -> bool:
        ops.heal("lock")
        os.unlink(ops.paths[descriptor])
        return False

    ops.replace_call("lock", locked_by_another)
    storage.put(str(tmp_path / "file"), b"whole")
    assert ops.names().count("open_exclusive") == 2
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_temporaries_that_always_vanish_end_in_an_error(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def vanished(real: Callable[..., Any], descriptor: int) -> bool:
        os.unlink(ops.paths[descriptor])
        return True

    ops.replace_call("lock", vanished)
    with pytest.raises(StorageError, match="removing the temporary"):
        storage.begin(str(tmp_path / "file"), 5)
    assert not descriptors_left_open(ops)


def test_a_name_already_taken_by_chance_is_not_used(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def taken(real: Callable[..., Any], path: str) -> int:
        ops.heal("open_exclusive")
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    ops.replace_call("open_exclusive", taken)
    storage.put(str(tmp_path / "file"), b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_where_there_are_no_locks_files_are_written_and_temporaries_left_alone(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.fail("lock", errno.ENOLCK)
    write = storage.begin(str(tmp_path / "file"), 5)
    storage.put(str(tmp_path / "file"), b"other")
    write.write_at(0, memoryview(b"whole"))
    write.commit()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_what_cannot_be_looked_at_when_clearing_up_does_not_stop_a_save(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / ".file.0123456789abcdef.tmp").touch()
    for step in ("open_write", "list_directory"):
        ops.fail(step, errno.EACCES)
        storage.put(str(tmp_path / "file"), b"whole")
        ops.heal(step)
        assert names_in(tmp_path) == [".file.0123456789abcdef.tmp", "file"]


def test_a_failure_between_creation_and_lock_leaves_nothing(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def interrupted(real: Callable[..., Any], descriptor: int) -> bool:
        raise KeyboardInterrupt

    ops.replace_call("lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.begin(str(tmp_path / "file"), 5)
    assert names_in(tmp_path) == []
    assert not descriptors_left_open(ops)
