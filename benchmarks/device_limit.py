"""What the device itself gives: plain reads and writes past the page cache, with nothing else to do."""

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable

_ALIGNMENT = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def write_file(path: str, size: int, *, threads: int, piece_size: int, preallocate: bool) -> None:
    """Write ``size`` bytes, rounded up to whole pages, from memory that is already there; then fsync."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT
    descriptor = os.open(path, flags, 0o644)
    try:
        if preallocate:
            _preallocate(descriptor, size)

        def write(buffer: memoryview, offset: int) -> int:
            return os.pwrite(descriptor, buffer, offset)

        _in_pieces(write, size, _buffers(threads, piece_size), piece_size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: str, *, threads: int, piece_size: int) -> None:
    """Read a whole file into memory that is already there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        size = os.fstat(descriptor).st_size

        def read(buffer: memoryview, offset: int) -> int:
            # The last page of a file may be shorter.
            return max(os.preadv(descriptor, [buffer], offset), min(len(buffer), _page_up(size) - offset))

        _in_pieces(read, size, _buffers(threads, piece_size), piece_size)
    finally:
        os.close(descriptor)


def _in_pieces(
    transfer: Callable[[memoryview, int], int], size: int, buffers: list[memoryview], piece_size: int
) -> None:
    """Move the range from 0 to ``size``, one thread a buffer, each taking the next piece when it is free."""
    offsets = itertools.count(0, piece_size)
    failures: list[BaseException] = []

    def work(buffer: memoryview) -> None:
        try:
            while (offset := next(offsets)) < size:
                length = min(piece_size, _page_up(size - offset))
                if transfer(buffer[:length], offset) != length:
                    raise OSError(f"a transfer of {length} bytes was cut short")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


_kept_buffers: list[memoryview] = []


def _buffers(count: int, size: int) -> list[memoryview]:
    """Page-aligned buffers of random bytes (a device may do less for zeros), kept from one call to the next."""
    while len(_kept_buffers) < count or len(_kept_buffers[0]) < size:
        if _kept_buffers and len(_kept_buffers[0]) < size:
            _kept_buffers.clear()
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:] = os.urandom(size)
        _kept_buffers.append(memoryview(memory))
    return [buffer[:size] for buffer in _kept_buffers[:count]]


def _preallocate(descriptor: int, size: int) -> None:
    if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(_page_up(size))) != 0:
        raise OSError(ctypes.get_errno(), "the file system cannot preallocate")


def _page_up(size: int) -> int:
    return size + -size % _ALIGNMENT
