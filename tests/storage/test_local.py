"""LocalStorage keeps the contract of all backends, and its own about paths, links and modes."""

import errno
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from lastgood.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, StorageError
from lastgood.storage.base import StorageBackend
from lastgood.storage.file_ops import OsFileOps
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import StorageBackendTests, random_bytes, read_all


class TestLocalStorage(StorageBackendTests):
    def make_backend(self, tmp_path: Path) -> tuple[StorageBackend, str]:
        return LocalStorage(), str(tmp_path / "root")


@pytest.fixture
def storage() -> LocalStorage:
    return LocalStorage()


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_relative_path_stays_where_it_was_when_the_working_directory_changes(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write = storage.begin("file", 3)
    monkeypatch.chdir(tmp_path / "there")
    write.write_at(0, memoryview(b"abc"))
    write.commit()
    assert (tmp_path / "here" / "file").read_bytes() == b"abc"
    assert names_in(tmp_path / "there") == []


def test_two_dots_after_a_link_mean_what_they_mean_to_the_system(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    storage.put(f"{tmp_path}/link/../file", b"abc")
    assert (tmp_path / "real" / "file").read_bytes() == b"abc"


def test_a_symbolic_link_is_replaced_and_its_target_left_alone(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    storage.put(str(tmp_path / "link"), b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()


def test_the_umask_decides_on_the_mode(storage: LocalStorage, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.put(str(tmp_path / "file"), b"abc")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_temporaries_are_not_listed_but_names_like_them_are(storage: LocalStorage, tmp_path: Path) -> None:
    write = storage.begin(str(tmp_path / "file"), 3)
    (tmp_path / ".file.backup.tmp").touch()
    assert len(names_in(tmp_path)) == 2
    assert storage.list(str(tmp_path)) == [".file.backup.tmp"]
    write.abort()


def test_a_file_among_the_parents_is_named(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"a file")
    with pytest.raises(StorageError) as caught:
        storage.begin(str(tmp_path / "notes" / "run" / "file"), 3)
    assert f"{tmp_path / 'notes'} is a file, not a directory" in str(caught.value)
    assert "untouched" in str(caught.value)
    assert caught.value.errno == errno.ENOTDIR
    assert (tmp_path / "notes").read_bytes() == b"a file"


def test_a_dangling_link_among_the_parents_is_an_error(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"link"):
        storage.put(str(tmp_path / "link" / "file"), b"abc")
    assert names_in(tmp_path) == ["link"]


def test_a_directory_of_that_name_is_refused_before_anything_is_made(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "inside").touch()
    path = str(tmp_path / "directory")
    for action in (lambda: storage.begin(path, 3), lambda: storage.open(path), lambda: storage.delete(path)):
        with pytest.raises(StorageError, match="belongs to a directory") as caught:
            action()
        assert caught.value.errno == errno.EISDIR
        assert caught.value.path == path
    assert names_in(tmp_path) == ["directory"]
    assert names_in(tmp_path / "directory") == ["inside"]


def test_a_directory_made_under_the_name_while_writing_fails_the_commit_only(
    storage: LocalStorage, tmp_path: Path
) -> None:
    write = storage.begin(str(tmp_path / "file"), 3)
    write.write_at(0, memoryview(b"abc"))
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="belongs to a directory"):
        write.commit()
    assert names_in(tmp_path) == ["file"]


def test_a_name_that_is_too_long(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long") as caught:
        storage.put(str(tmp_path / ("x" * 250)), b"abc")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert isinstance(caught.value.__cause__, OSError)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("path", ["", "a\0b", "lone surrogate \ud800"])
def test_what_is_no_path(storage: LocalStorage, path: str) -> None:
    for action in (storage.open, storage.exists, storage.list, storage.delete, lambda path: storage.put(path, b"")):
        with pytest.raises(ConfigError):
            action(path)


def test_sizes_and_ranges_that_cannot_be(storage: LocalStorage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="-1 bytes"):
        storage.begin(str(tmp_path / "file"), -1)
    write = storage.begin(str(tmp_path / "file"), 10)
    for offset, length in ((-1, 1), (8, 3), (11, 0)):
        with pytest.raises(ConfigError, match="10 bytes"):
            write.write_at(offset, memoryview(bytes(length)))
    write.write_at(10, memoryview(b""))
    write.abort()
    (tmp_path / "other").write_bytes(b"abc")
    with closing(storage.open(str(tmp_path / "other"))) as stored, pytest.raises(ConfigError, match="offset -1"):
        stored.read_into(-1, memoryview(bytearray(1)))


def test_nothing_is_written_after_the_end(storage: LocalStorage, tmp_path: Path) -> None:
    write = storage.begin(str(tmp_path / "file"), 3)
    write.make_durable()
    with pytest.raises(ConfigError, match="after make_durable"):
        write.write_at(0, memoryview(b"abc"))
    write.commit()
    for action in (write.commit, lambda: write.write_at(0, memoryview(b"abc"))):
        with pytest.raises(ConfigError, match="closed or aborted"):
            action()
    assert (tmp_path / "file").read_bytes() == bytes(3)
    stored = storage.open(str(tmp_path / "file"))
    stored.close()
    with pytest.raises(ConfigError, match="closed"):
        stored.read_into(0, memoryview(bytearray(1)))


def test_a_missing_file_is_not_found_whatever_is_missing(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "no" / "such" / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            storage.open(str(path))
        assert caught.value.errno == errno.ENOENT
        assert isinstance(caught.value.__cause__, OSError)


def test_a_pipe_is_refused_without_waiting_for_its_writer(storage: LocalStorage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        storage.open(str(tmp_path / "pipe"))


def test_a_file_cut_off_after_it_was_opened_is_corrupt(storage: LocalStorage, tmp_path: Path) -> None:
    for size in (1000, 3 << 20):
        path = tmp_path / "file"
        storage.put(str(path), random_bytes(size))
        with closing(storage.open(str(path))) as stored:
            os.truncate(path, size // 2)
            with pytest.raises(CorruptCheckpointError, match=f"ends at {size // 2}"):
                stored.read_into(0, memoryview(bytearray(size)))


def test_a_range_beyond_the_end_changes_nothing_in_the_target(storage: LocalStorage, tmp_path: Path) -> None:
    storage.put(str(tmp_path / "file"), b"12345")
    target = bytearray(6)
    with closing(storage.open(str(tmp_path / "file"))) as stored, pytest.raises(CorruptCheckpointError):
        stored.read_into(0, memoryview(target))
    assert target == bytes(6)


def test_exclusive_creation_does_not_open_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        OsFileOps().open_exclusive(str(tmp_path / "file"))


def test_many_files_of_one_directory_do_not_mix_up_their_temporaries(storage: LocalStorage, tmp_path: Path) -> None:
    names = ["file", "file.tmp", "file.0123456789abcdef.tmp", ".file", "fil", "a b\nc", "ü"]
    writes = [storage.begin(str(tmp_path / name), 1) for name in names]
    for number, write in enumerate(writes):
        write.write_at(0, memoryview(bytes([number])))
    for write in writes:
        write.commit()
    assert names_in(tmp_path) == sorted(names)
    for number, name in enumerate(names):
        assert read_all(storage, str(tmp_path / name)) == bytes([number])


_WITHOUT_PERMISSION = """
import os, sys
from lastgood.errors import StorageError
from lastgood.storage.local import LocalStorage
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    LocalStorage().put(sys.argv[1] + "/file", b"new")
except StorageError as error:
    print(error.errno, error)
"""


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    # The directories that pytest makes may be entered by their owner alone: the one for this test stands elsewhere.
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "file").write_bytes(b"old")
        os.chmod(name, 0o555)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _WITHOUT_PERMISSION, name]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.startswith(f"{errno.EACCES} ")
        assert "permission denied" in result.stdout
        assert "untouched" in result.stdout
        assert (Path(name) / "file").read_bytes() == b"old"
        os.chmod(name, 0o755)
