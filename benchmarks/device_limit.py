"""What the device itself gives: plain reads and writes past the page cache, with nothing else to do."""

import ctypes
import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable

_ALIGNMENT = 4096
_MOST_THREADS = 4
_LARGEST_PIECE = 16 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def write_file(path: str, size: int, *, threads: int, piece_size: int, preallocate: bool) -> None:
    """Write ``size`` bytes, rounded up to whole pages, from memory that is already there; then fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
    try:
        if preallocate:
            _preallocate(descriptor, size)

        def write(buffer: memoryview, offset: int) -> None:
            if os.pwrite(descriptor, buffer, offset) != len(buffer):
                raise OSError("a write was cut short")

        _in_pieces(write, size, threads, piece_size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: str, *, threads: int, piece_size: int) -> None:
    """Read a whole file into memory that is already there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        size = os.fstat(descriptor).st_size

        def read(buffer: memoryview, offset: int) -> None:
            if os.preadv(descriptor, [buffer], offset) < min(len(buffer), size - offset):
                raise OSError("a read was cut short")

        _in_pieces(read, size, threads, piece_size)
    finally:
        os.close(descriptor)


def _in_pieces(transfer: Callable[[memoryview, int], None], size: int, threads: int, piece_size: int) -> None:
    """Move the range from 0 to ``size``; every thread takes the next piece when it is free."""
    offsets = itertools.count(0, piece_size)
    failures: list[BaseException] = []

    def work(buffer: memoryview) -> None:
        try:
            while (offset := next(offsets)) < size:
                transfer(buffer[: min(piece_size, _page_up(size - offset))], offset)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(buffer,)) for buffer in _buffers()[:threads]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


@functools.cache
def _buffers() -> list[memoryview]:
    """Page-aligned buffers of random bytes (a device may do less for zeros), one a thread, kept for good."""
    buffers = []
    for _ in range(_MOST_THREADS):
        memory = mmap.mmap(-1, _LARGEST_PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:] = os.urandom(_LARGEST_PIECE)
        buffers.append(memoryview(memory))
    return buffers


def _preallocate(descriptor: int, size: int) -> None:
    if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(_page_up(size))) != 0:
        raise OSError(ctypes.get_errno(), "the file system cannot preallocate")


def _page_up(size: int) -> int:
    return size + -size % _ALIGNMENT
