"""Whatever way the bytes take, past the page cache or through it, they are the same bytes."""

import ctypes
import errno
import itertools
import mmap
import os
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.storage.recording import (
    RecordingFileOps,
    drop_from_page_cache,
    has_direct_io,
    refuse_direct_at_open,
    refuse_direct_when_used,
)

from lastgood._memory import address_of, copy_memory
from lastgood.errors import StorageError
from lastgood.storage._direct_io import ALIGNMENT, aligned_buffer, round_down, round_up
from lastgood.storage.file_ops import OsFileOps
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import random_bytes


def aligned_copy(data: bytes, shift: int = 0) -> memoryview:
    """The data in memory, ``shift`` bytes after an aligned address."""
    buffer = aligned_buffer(len(data) + shift)[shift:]
    buffer[:] = data
    return buffer


def nothing_is_cached(real: Callable[..., Any], *arguments: Any) -> int:
    return 0


def test_an_aligned_buffer_is_aligned_writable_and_all_of_it_is_there() -> None:
    for size in (0, 1, ALIGNMENT, ALIGNMENT + 1, (2 << 20) + 1):
        buffer = aligned_buffer(size)
        assert len(buffer) == size
        assert not buffer.readonly
        assert not any(buffer)
        if size:
            assert address_of(buffer) % ALIGNMENT == 0
            buffer[-1] = 7
            assert buffer[-1] == 7
    assert ALIGNMENT % 4096 == 0
    assert ALIGNMENT % mmap.PAGESIZE == 0


def test_the_address_of_a_buffer_is_where_its_bytes_are() -> None:
    content = b"the bytes themselves"
    for buffer in (content, bytearray(content), memoryview(content), aligned_copy(content, 3).toreadonly()):
        assert ctypes.string_at(address_of(buffer), len(content)) == content
        assert ctypes.string_at(address_of(memoryview(buffer)[4:]), len(content) - 4) == content[4:]
    with pytest.raises(TypeError):
        address_of("no buffer")  # type: ignore[arg-type]


def test_rounding_and_copying() -> None:
    assert [round_down(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, 0, ALIGNMENT, ALIGNMENT]
    assert [round_up(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]
    target = bytearray(5)
    copy_memory(address_of(target) + 1, address_of(b"abc"), 3)
    assert target == b"\0abc\0"


def test_aligned_bytes_go_past_the_page_cache_and_only_they(tmp_path: Path) -> None:
    if not has_direct_io(str(tmp_path)):
        pytest.skip(f"the file system of {tmp_path} has no direct I/O")
    ops = RecordingFileOps()
    data = random_bytes((1 << 20) + 10)
    write = LocalStorage(ops).begin(str(tmp_path / "file"), len(data))
    # Read-only memory is as good, and a start inside a page costs no more than that page.
    write.write_at(0, aligned_copy(data[:100_000]).toreadonly())
    write.write_at(100_000, aligned_copy(data, 0)[100_000:])
    write.commit()
    assert (tmp_path / "file").read_bytes() == data
    head = round_down(100_000)
    written = [
        (call.arguments[0] in ops.direct, call.arguments[2], len(call.arguments[1])) for call in ops.of("pwrite")
    ]
    assert written == [
        (True, 0, head),
        (False, head, 100_000 - head),
        (False, 100_000, head + ALIGNMENT - 100_000),
        (True, head + ALIGNMENT, (1 << 20) - head - ALIGNMENT),
        (False, 1 << 20, 10),
    ]


@pytest.mark.parametrize("refusal", [None, refuse_direct_at_open, refuse_direct_when_used])
def test_hazard_17_odirect_refused_falls_back(
    tmp_path: Path, refusal: Callable[[RecordingFileOps], None] | None
) -> None:
    ops = RecordingFileOps()
    if refusal is not None:
        refusal(ops)
    storage = LocalStorage(ops)
    data = random_bytes((2 << 20) + 777)
    write = storage.begin(str(tmp_path / "file"), len(data))
    for start, end in itertools.pairwise((0, 1 << 20, (1 << 20) + 5000, len(data))):
        write.write_at(start, aligned_copy(data)[start:end])
    write.write_at(0, aligned_copy(data[: 1 << 20], 64))  # memory that direct I/O would not take
    write.commit()
    assert (tmp_path / "file").read_bytes() == data
    if refusal is not None:
        assert len(ops.of("open_direct")) == 1  # asked once, not for every piece
    drop_from_page_cache(tmp_path / "file")
    target = aligned_buffer(len(data))
    with closing(storage.open(str(tmp_path / "file"))) as stored:
        stored.read_into(0, target)
    assert target == data


@pytest.mark.parametrize("refusal", [None, refuse_direct_when_used])
def test_any_range_at_any_address_reads_the_same_cold_and_warm(
    tmp_path: Path, rng_seed: int, refusal: Callable[[RecordingFileOps], None] | None
) -> None:
    rng = random.Random(rng_seed)
    data = rng.randbytes((10 << 20) + 4099)
    (tmp_path / "file").write_bytes(data)
    for cold in (True, False):
        ops = RecordingFileOps()
        if cold:
            ops.replace_call("cached_bytes", nothing_is_cached)
        if refusal is not None:
            refusal(ops)
        with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
            for _ in range(8):
                start = rng.choice([0, ALIGNMENT, 1 << 20, rng.randrange(len(data))])
                end = rng.choice([len(data), rng.randrange(start, len(data) + 1)])
                target = aligned_copy(bytes(end - start), rng.choice([0, 64, start % ALIGNMENT]))
                stored.read_into(start, target)
                assert target == data[start:end], (start, end)


def test_short_and_interrupted_reads_give_the_exact_bytes(tmp_path: Path) -> None:
    lengths = itertools.cycle([4096, 100_000, 1, 500_000, 7])
    turn = itertools.count()

    def short(real: Callable[..., Any], descriptor: int, target: memoryview, offset: int) -> int:
        if next(turn) % 3 == 2:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        if descriptor in ops.direct:
            count = int(real(descriptor, target, offset))
            # Fewer bytes than came, whatever the device's own granularity: what was not reported does not count.
            return min(count, next(lengths) + 4096)
        return int(real(descriptor, target[: next(lengths)], offset))

    data = random_bytes((3 << 20) + 123)
    (tmp_path / "file").write_bytes(data)
    for answer in (nothing_is_cached, None):
        for shift in (0, 64):
            ops = RecordingFileOps()
            ops.replace_call("pread_into", short)
            if answer is not None:
                ops.replace_call("cached_bytes", answer)
            target = aligned_copy(bytes(len(data)), shift)
            with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
                stored.read_into(0, target)
            assert target == data
            assert len(ops.of("pread_into")) > 5


def test_what_is_cached_is_read_from_the_cache_and_what_is_not_past_it(tmp_path: Path) -> None:
    if not has_direct_io(str(tmp_path)):
        pytest.skip(f"the file system of {tmp_path} has no direct I/O")
    data = random_bytes(4 << 20)
    (tmp_path / "file").write_bytes(data)
    half = 2 << 20

    def half_is_cached(real: Callable[..., Any], descriptor: int, offset: int, length: int) -> int:
        return max(0, min(half - offset, length))

    ops = RecordingFileOps()
    ops.replace_call("cached_bytes", half_is_cached)
    target = aligned_buffer(len(data))
    with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
        stored.read_into(0, target)
    assert target == data
    reads = [
        (call.arguments[0] in ops.direct, call.arguments[2], len(call.arguments[1])) for call in ops.of("pread_into")
    ]
    assert reads == [(False, 0, half), (True, half, half)]


def test_what_other_processes_of_this_machine_read_too_is_read_through_the_cache(tmp_path: Path) -> None:
    """So that the device is asked once for all of them."""
    if not has_direct_io(str(tmp_path)):
        pytest.skip(f"the file system of {tmp_path} has no direct I/O")
    data = random_bytes(1 << 20)
    (tmp_path / "file").write_bytes(data)
    for is_shared in (False, True):
        ops = RecordingFileOps()
        ops.replace_call("cached_bytes", lambda *call: 0)
        target = aligned_buffer(len(data))
        with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
            if is_shared:
                stored.expect_other_readers()
            stored.read_into(0, target)
        assert target == data
        assert {call.arguments[0] in ops.direct for call in ops.of("pread_into")} == {not is_shared}


def test_asking_what_is_cached_reads_nothing(tmp_path: Path) -> None:
    size = 2 << 20
    path = tmp_path / "file"
    path.write_bytes(random_bytes(size))
    drop_from_page_cache(path)
    ops = OsFileOps()
    descriptor = ops.open_read(str(path))
    try:
        if ops.cached_bytes(descriptor, 0, size):
            pytest.skip(f"the file system of {tmp_path} keeps its files in memory")
        assert ops.cached_bytes(descriptor, 0, size) == 0
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(descriptor, mmap.PAGESIZE, mmap.PAGESIZE)
        assert ops.cached_bytes(descriptor, 0, size) == 0
        assert ops.cached_bytes(descriptor, mmap.PAGESIZE + 5, size // 2) == mmap.PAGESIZE - 5
        os.pread(descriptor, size, 0)
        assert ops.cached_bytes(descriptor, 5, size - 10) == size - 10
    finally:
        ops.close(descriptor)


def test_where_the_cache_cannot_be_asked_reading_goes_through_it(tmp_path: Path) -> None:
    data = random_bytes(1 << 20)
    (tmp_path / "file").write_bytes(data)
    ops = RecordingFileOps()
    ops.fail("cached_bytes", errno.ENODEV)
    target = aligned_buffer(len(data))
    with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
        stored.read_into(0, target)
        stored.read_into(0, target)
    assert target == data
    assert len(ops.of("cached_bytes")) == 1
    assert all(call.arguments[0] not in ops.direct for call in ops.of("pread_into"))


def test_a_file_replaced_while_it_is_opened_is_read_from_one_of_the_two(tmp_path: Path) -> None:
    old, new = random_bytes(1 << 20), random_bytes(1 << 20)
    path = tmp_path / "file"
    path.write_bytes(old)

    def replaced_first(real: Callable[..., Any], name: str, write: bool) -> int:
        LocalStorage().put(name, new)
        return int(real(name, write))

    ops = RecordingFileOps()
    ops.replace_call("open_direct", replaced_first)
    ops.replace_call("cached_bytes", nothing_is_cached)
    target = aligned_buffer(len(old))
    with closing(LocalStorage(ops).open(str(path))) as stored:
        stored.read_into(0, target)
    assert target == old
    assert path.read_bytes() == new


def test_a_read_error_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    for size in (10, 1 << 20):
        ops = RecordingFileOps()
        ops.fail("pread_into", errno.EIO)
        ops.replace_call("cached_bytes", nothing_is_cached)
        with closing(LocalStorage(ops).open(str(tmp_path / "file"))) as stored:
            with pytest.raises(StorageError, match=r"reading .*file failed: the device reported") as caught:
                stored.read_into(0, memoryview(bytearray(size)))
            assert caught.value.errno == errno.EIO


def test_a_failure_while_opening_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    ops = RecordingFileOps()
    ops.fail("status", errno.EIO)
    turn = itertools.count()

    def failing_later(real: Callable[..., Any], target: str | int) -> Any:
        if next(turn):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(target)

    ops.replace_call("status", failing_later)
    with pytest.raises(StorageError, match="opening"):
        LocalStorage(ops).open(str(tmp_path / "file"))
    assert len(ops.of("open_read")) == len(ops.of("close")) == 1
