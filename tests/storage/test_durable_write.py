"""The order of a durable write, and what is left of it when one of its steps fails."""

import errno
import itertools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.storage.recording import RecordingFileOps, descriptors_left_open, names_in

from lastgood.errors import ConfigError, StorageError
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import random_bytes, running

QUESTIONS = {"status", "available_bytes", "list_directory", "open_write", "open_direct", "close"}


@pytest.fixture
def ops() -> RecordingFileOps:
    return RecordingFileOps()


@pytest.fixture
def storage(ops: RecordingFileOps) -> LocalStorage:
    return LocalStorage(ops)


def steps(ops: RecordingFileOps, root: Path) -> list[tuple[str, str]]:
    """What was done (not what was asked), on which path below the root; T stands for the temporary."""

    def shown(path: str) -> str:
        return re.sub(r"\.file\.[0-9a-f]{16}\.tmp", "T", os.path.relpath(path, root))

    return [(call.name, shown(call.path)) for call in ops.calls if call.name not in QUESTIONS]


def test_hazard_09_every_step_of_a_durable_write_is_there_and_in_order(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    data = aligned_buffer((1 << 20) + 10)
    write = storage.begin(str(tmp_path / "run" / "step" / "file"), len(data))
    write.write_at(0, data)
    write.commit()
    assert steps(ops, tmp_path) == [
        ("fsync_directory", ".."),
        ("make_directory", "run"),
        ("fsync_directory", "."),
        ("make_directory", "run/step"),
        ("fsync_directory", "run"),
        ("open_exclusive", "run/step/T"),
        ("lock", "run/step/T"),
        ("reserve", "run/step/T"),
        ("pwrite", "run/step/T"),
        ("pwrite", "run/step/T"),
        ("fsync", "run/step/T"),
        ("replace", "run/step/T"),
        ("fsync_directory", "run/step"),
    ]
    assert ops.of("replace")[0].arguments[1] == str(tmp_path / "run" / "step" / "file")


def test_a_put_is_the_same_durable_write(ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path) -> None:
    storage.put(str(tmp_path / "file"), b"data")
    written = ["open_exclusive", "lock", "reserve", "pwrite", "fsync"]
    assert [name for name, _ in steps(ops, tmp_path)] == [
        "fsync_directory",
        *written,
        "replace",
        "fsync_directory",
    ]
    ops.calls.clear()
    storage.put_if_absent(str(tmp_path / "other"), b"data")
    assert [name for name, _ in steps(ops, tmp_path)] == [
        "fsync_directory",
        *written,
        "link",
        "unlink",
        "fsync_directory",
    ]


def test_a_directory_left_by_a_maker_who_died_before_its_fsync_is_made_durable_too(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    storage.put(str(tmp_path / "run" / "file"), b"data")
    assert ("fsync_directory", ".") in steps(ops, tmp_path)


def test_a_directory_that_another_process_makes_at_the_same_time_is_used_and_made_durable(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def too_late(real: Callable[..., Any], path: str) -> None:
        real(path)
        real(path)

    ops.replace_call("make_directory", too_late)
    storage.put(str(tmp_path / "run" / "file"), b"data")
    assert steps(ops, tmp_path)[1:3] == [("make_directory", "run"), ("fsync_directory", ".")]
    assert (tmp_path / "run" / "file").read_bytes() == b"data"


def test_a_parent_that_may_not_be_listed_is_not_ours_to_make_durable(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def forbidden(real: Callable[..., Any], path: str) -> None:
        if path == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        real(path)

    (tmp_path / "run").mkdir()
    ops.replace_call("fsync_directory", forbidden)
    storage.put(str(tmp_path / "run" / "file"), b"data")
    assert (tmp_path / "run" / "file").read_bytes() == b"data"


def test_a_delete_is_durable_even_when_the_file_is_gone_already(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        ops.calls.clear()
        storage.delete(str(tmp_path / "file"))
        assert steps(ops, tmp_path) == [("unlink", "file"), ("fsync_directory", ".")]


def test_hazard_09_failed_fsync_is_never_retried(ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    ops.fail("fsync", errno.EIO)
    write = storage.begin(str(tmp_path / "file"), 3)
    write.write_at(0, memoryview(b"new"))
    with pytest.raises(StorageError, match=r"(?s)fsyncing .*I/O error.*untouched") as caught:
        write.make_durable()
    assert caught.value.errno == errno.EIO
    assert caught.value.path == str(tmp_path / "file")
    assert names_in(tmp_path) == ["file"]
    for action in (write.make_durable, write.commit, lambda: write.write_at(0, memoryview(b"new"))):
        with pytest.raises(ConfigError):
            action()
    write.abort()
    after = ops.names()[ops.names().index("fsync") + 1 :]
    assert set(after) <= {"unlink", "close"}
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    ops.heal("fsync")
    storage.put(str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_interrupt_during_fsync_abandons_the_file(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    def interrupted(real: Callable[..., Any], descriptor: int) -> None:
        raise KeyboardInterrupt

    ops.replace_call("fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.put(str(tmp_path / "file"), b"new")
    assert ops.names().count("fsync") == 1
    assert "replace" not in ops.names()
    assert names_in(tmp_path) == []


def test_a_write_while_the_file_is_fsynced_is_refused(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    write = storage.begin(str(tmp_path / "file"), 3)

    def written_to(real: Callable[..., Any], descriptor: int) -> None:
        with pytest.raises(ConfigError, match="after make_durable"):
            write.write_at(0, memoryview(b"new"))
        real(descriptor)

    ops.replace_call("fsync", written_to)
    write.commit()
    assert not ops.of("pwrite")


def test_a_second_make_durable_does_not_fsync_again(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    write = storage.begin(str(tmp_path / "file"), 0)
    write.make_durable()
    write.make_durable()
    write.commit()
    assert ops.names().count("fsync") == 1


@pytest.mark.parametrize(("replace", "advice"), [(True, "save again"), (False, "to another path")])
def test_a_failed_fsync_of_the_directory_says_that_the_file_is_there(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path, replace: bool, advice: str
) -> None:
    """What replaces nothing is a manifest: a save to the same path would meet it, and be refused."""
    write = storage.begin(str(tmp_path / "file"), 0)
    ops.fail("fsync_directory", errno.EIO)
    with pytest.raises(StorageError, match=rf"The new file has its name.*{advice}"):
        write.commit(replace=replace)
    write.abort()
    assert names_in(tmp_path) == ["file"]


def test_a_file_system_without_fsync_of_directories_is_no_error(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.fail("fsync_directory", errno.EINVAL)
    storage.put(str(tmp_path / "run" / "file"), b"data")
    assert (tmp_path / "run" / "file").read_bytes() == b"data"


@pytest.mark.parametrize("step", ["open_exclusive", "reserve", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EROFS, errno.ENOSPC, errno.EFBIG])
def test_whatever_step_fails_the_old_file_stays_and_nothing_else(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path, step: str, number: int
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    ops.fail(step, number)
    with pytest.raises(StorageError, match="untouched") as caught:
        storage.put(str(tmp_path / "file"), b"new")
    assert caught.value.errno == number
    assert caught.value.__cause__ is not None
    assert str(tmp_path / "file") in str(caught.value)
    assert names_in(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not descriptors_left_open(ops)


def test_an_abort_that_cannot_remove_the_temporary_does_not_raise(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    write = storage.begin(str(tmp_path / "file"), 3)
    ops.fail("unlink", errno.EIO)
    write.abort()
    assert len(names_in(tmp_path)) == 1
    ops.heal("unlink")
    storage.begin(str(tmp_path / "file"), 3).abort()
    assert names_in(tmp_path) == []


def test_short_and_interrupted_writes_give_the_exact_bytes(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    # Lengths that are a multiple of a page, and that are not: both happen to direct writes.
    lengths = itertools.cycle([4096, 100_000, 1, 65536, 131_072, 7])
    turn = itertools.count()

    def short(real: Callable[..., Any], descriptor: int, data: memoryview, offset: int) -> int:
        if next(turn) % 3 == 2:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        if descriptor in ops.direct:
            return int(real(descriptor, data[: max(4096, next(lengths) // 4096 * 4096)], offset))
        return int(real(descriptor, data[: next(lengths)], offset))

    ops.replace_call("pwrite", short)
    data = random_bytes((2 << 20) + 123)
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    write = storage.begin(str(tmp_path / "file"), len(data))
    write.write_at(0, buffer)
    write.commit()
    assert (tmp_path / "file").read_bytes() == data
    assert len(ops.of("pwrite")) > 10


def test_a_write_that_takes_nothing_is_an_error_and_no_endless_loop(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.replace_call("pwrite", lambda real, *arguments: 0)
    with pytest.raises(StorageError, match="untouched"):
        storage.put(str(tmp_path / "file"), b"new")
    assert len(ops.of("pwrite")) == 1


def test_space_that_cannot_be_reserved_is_done_without(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    for number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        ops.fail("reserve", number)
        write = storage.begin(str(tmp_path / "file"), 100)
        write.write_at(50, memoryview(b"abc"))
        write.commit()
        assert (tmp_path / "file").read_bytes() == bytes(50) + b"abc" + bytes(47)


def test_a_reservation_that_signals_go_on_interrupting_is_given_up(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    ops.fail("reserve", errno.EINTR)
    storage.put(str(tmp_path / "file"), b"data")
    assert 1 < len(ops.of("reserve")) < 100
    assert (tmp_path / "file").read_bytes() == b"data"


def test_an_abort_under_a_running_write_closes_only_after_it(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def held_up(real: Callable[..., Any], descriptor: int, data: memoryview, offset: int) -> int:
        inside.set()
        assert go_on.wait(60)
        return int(real(descriptor, data[:10], offset))

    ops.replace_call("pwrite", held_up)
    write = storage.begin(str(tmp_path / "file"), 100)

    def write_and_fail() -> None:
        with pytest.raises(ConfigError, match="aborted while"):
            write.write_at(0, memoryview(bytes(100)))

    with running(write_and_fail):
        assert inside.wait(60)
        write.abort()
        closed_at_once = "close" in ops.names()
        go_on.set()
    assert not closed_at_once
    assert names_in(tmp_path) == []
    assert ops.names().count("close") == 1
    assert len(ops.of("pwrite")) == 1


def test_a_disk_that_fills_up_and_does_not_tell_how_much_is_left(
    ops: RecordingFileOps, storage: LocalStorage, tmp_path: Path
) -> None:
    write = storage.begin(str(tmp_path / "file"), 5)
    ops.fail("pwrite", errno.ENOSPC)
    ops.fail("available_bytes", errno.EIO)
    with pytest.raises(StorageError, match="5 bytes are needed, less than that is available") as caught:
        write.write_at(0, memoryview(b"whole"))
    assert caught.value.errno == errno.ENOSPC
    write.abort()
    assert names_in(tmp_path) == []
