"""The file operations that fail as they are told: what they do wrong, and that they do all else right."""

import errno
import inspect
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.workers import PATIENCE_SECS
from tests.storage.recording import has_direct_io

from lastgood.storage._direct_io import ALIGNMENT, aligned_buffer
from lastgood.storage.file_ops import FileOps, OsFileOps
from lastgood.testing.fault_file_ops import OPERATIONS, TRANSFERS, FaultFileOps


@pytest.fixture
def ops() -> FaultFileOps:
    return FaultFileOps()


@pytest.fixture
def file(ops: FaultFileOps, tmp_path: Path) -> Iterator[int]:
    descriptor = ops.open_exclusive(str(tmp_path / "file"))
    yield descriptor
    os.close(descriptor)


def test_it_has_every_operation_of_the_door_with_the_same_arguments() -> None:
    assert set(OPERATIONS) >= {"open_exclusive", "pwrite", "lock_shared"}
    assert set(TRANSFERS) < set(OPERATIONS)
    for name in OPERATIONS:
        expected = inspect.signature(getattr(FileOps, name))
        assert inspect.signature(getattr(FaultFileOps, name)) == expected, name
        assert inspect.signature(getattr(OsFileOps, name)) == expected, name


def test_without_a_fault_everything_is_done_and_counted(ops: FaultFileOps, tmp_path: Path) -> None:
    path, other = str(tmp_path / "file"), str(tmp_path / "other")
    descriptor = ops.open_exclusive(path)
    ops.reserve(descriptor, 4)
    ops.truncate(descriptor, 4)
    assert ops.pwrite(descriptor, memoryview(b"abcd"), 0) == 4
    target = bytearray(4)
    assert ops.pread_into(descriptor, memoryview(target), 0) == 4
    assert target == b"abcd"
    ops.fsync(descriptor)
    assert ops.cached_bytes(descriptor, 0, 4) == 4
    assert ops.lock(descriptor)
    assert ops.lock_shared(descriptor)
    assert ops.status(descriptor) == ops.status(path)
    ops.close(descriptor)
    ops.link(path, other)
    ops.replace(other, path)
    ops.unlink(other)  # two names of one file: a rename leaves both
    ops.rename_without_replacing(path, other)
    ops.fsync_directory(str(tmp_path))
    for name in ("open_read", "open_write", "open_append"):
        ops.close(getattr(ops, name)(other))
    ops.make_directory(path)
    assert sorted(ops.list_directory(str(tmp_path))) == ["file", "other"]
    ops.remove_directory(path)
    available = ops.available_bytes(str(tmp_path))
    assert available is None or available > 0
    if has_direct_io(str(tmp_path)):
        ops.close(ops.open_direct(other, write=True))
        assert set(ops.calls) == set(OPERATIONS)
    assert (ops.count("close"), ops.count("status"), ops.faults) == (ops.calls.count("close"), 2, 0)
    assert ops.count() == len(ops.calls)
    assert ops.calls[:3] == ["open_exclusive", "reserve", "truncate"]


def test_the_call_that_was_asked_for_fails_and_no_other(ops: FaultFileOps, file: int) -> None:
    ops.fail("truncate", errno.EIO, call=2)
    ops.truncate(file, 10)
    with pytest.raises(OSError, match="Input/output error") as caught:
        ops.truncate(file, 20)
    assert caught.value.errno == errno.EIO
    assert ops.status(file).size == 10
    ops.truncate(file, 30)
    assert (ops.status(file).size, ops.faults) == (30, 1)


def test_a_lasting_fault_lasts_until_it_is_healed(ops: FaultFileOps, file: int) -> None:
    ops.fail("fsync", errno.EDQUOT, call=2, lasting=True)
    ops.fsync(file)
    for _ in range(2):
        with pytest.raises(OSError, match="quota"):
            ops.fsync(file)
    ops.heal()
    ops.fsync(file)
    assert ops.faults == 2


def test_the_nth_call_of_any_operation(ops: FaultFileOps, tmp_path: Path) -> None:
    ops.fail(None, errno.EIO, call=3)
    assert ops.list_directory(str(tmp_path)) == []
    ops.make_directory(str(tmp_path / "a"))
    with pytest.raises(OSError, match=str(tmp_path / "b")):
        ops.make_directory(str(tmp_path / "b"))
    assert ops.list_directory(str(tmp_path)) == ["a"]


def test_what_was_asked_for_last_counts(ops: FaultFileOps, file: int) -> None:
    ops.fail("fsync", errno.EINVAL, lasting=True)
    ops.fail("fsync", errno.EIO, call=2)
    for number in (errno.EINVAL, errno.EIO, errno.EINVAL):
        with pytest.raises(OSError, match=r"Invalid argument|Input/output error") as caught:
            ops.fsync(file)
        assert caught.value.errno == number


def test_an_interrupted_call_goes_well_the_next_time(ops: FaultFileOps, file: int) -> None:
    ops.fail("pwrite", errno.EINTR)
    with pytest.raises(InterruptedError):
        ops.pwrite(file, memoryview(b"abc"), 0)
    assert ops.status(file).size == 0
    assert ops.pwrite(file, memoryview(b"abc"), 0) == 3


def test_an_answer_that_is_lost_leaves_what_was_done(ops: FaultFileOps, tmp_path: Path) -> None:
    ops.fail("make_directory", errno.EIO, is_done=True)
    with pytest.raises(OSError, match="Input/output error"):
        ops.make_directory(str(tmp_path / "a"))
    assert (tmp_path / "a").is_dir()


def test_a_failed_close_has_closed(ops: FaultFileOps, tmp_path: Path) -> None:
    descriptor = ops.open_exclusive(str(tmp_path / "file"))
    ops.fail("close", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        ops.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(("longest", "moved"), [(1, 1), (3, 3), (None, 5), (100, 10)])
def test_a_short_transfer_moves_just_what_it_says(
    ops: FaultFileOps, file: int, longest: int | None, moved: int
) -> None:
    data, target = b"0123456789", bytearray(10)
    ops.shorten("pwrite", longest=longest)
    assert ops.pwrite(file, memoryview(data), 0) == moved
    assert ops.status(file).size == moved
    assert ops.pwrite(file, memoryview(data), 0) == 10
    ops.shorten("pread_into", longest=longest)
    assert ops.pread_into(file, memoryview(target), 0) == moved
    assert bytes(target) == data[:moved] + bytes(10 - moved)


def test_past_the_page_cache_short_transfers_are_of_whole_blocks(ops: FaultFileOps, tmp_path: Path) -> None:
    if not has_direct_io(str(tmp_path)):
        pytest.skip("the file system of the temporary directory has no direct I/O")
    path = str(tmp_path / "file")
    ops.close(ops.open_exclusive(path))
    buffer = aligned_buffer(4 * ALIGNMENT)
    descriptor = ops.open_direct(path, write=True)
    for longest, moved in ((1, ALIGNMENT), (None, 2 * ALIGNMENT), (3 * ALIGNMENT + 1, 3 * ALIGNMENT)):
        ops.shorten("pwrite", call=ops.count("pwrite") + 1, longest=longest)
        assert ops.pwrite(descriptor, buffer, 0) == moved
    ops.close(descriptor)
    # The same number, opened in another way, takes any length.
    assert ops.open_write(path) == descriptor
    ops.shorten("pwrite", call=4, longest=1)
    assert ops.pwrite(descriptor, buffer, 0) == 1
    ops.close(descriptor)


@pytest.mark.parametrize("healing", [True, False])
def test_a_stalled_call_comes_back_when_it_is_released_and_is_done_then(
    ops: FaultFileOps, tmp_path: Path, healing: bool
) -> None:
    stall = ops.stall("make_directory")
    assert not stall.is_reached
    assert not stall.wait_until_reached(0)
    made = tmp_path / "a"
    thread = threading.Thread(target=ops.make_directory, args=(str(made),), daemon=True)
    thread.start()
    assert stall.wait_until_reached(PATIENCE_SECS)
    assert stall.is_reached
    assert stall.threads == [thread]
    assert not made.exists()
    ops.make_directory(str(tmp_path / "b"))  # another call is not held up
    ops.heal() if healing else stall.release()
    thread.join(PATIENCE_SECS)
    assert made.is_dir()


def test_what_cannot_be_asked_for_is_refused(ops: FaultFileOps) -> None:
    with pytest.raises(ValueError, match="there is no operation 'fdatasync'"):
        ops.fail("fdatasync", errno.EIO)
    with pytest.raises(ValueError, match="'fsync' moves no bytes"):
        ops.shorten("fsync")
    with pytest.raises(ValueError, match="counted from 1"):
        ops.stall("fsync", call=0)


def test_it_puts_faults_before_other_operations_than_the_machines(tmp_path: Path) -> None:
    inner = FaultFileOps()
    outer = FaultFileOps(inner)
    outer.fail("list_directory", errno.EIO, call=2)
    outer.list_directory(str(tmp_path))
    with pytest.raises(OSError, match="Input/output error"):
        outer.list_directory(str(tmp_path))
    assert inner.calls == ["list_directory"]
