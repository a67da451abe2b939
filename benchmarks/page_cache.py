"""Getting files into the page cache and out of it, and asking which of their pages are there."""

import ctypes
import mmap
import os
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)


class PageCacheError(RuntimeError):
    """The page cache cannot be brought into the state that a measurement needs."""


def make_cold(paths: Sequence[str]) -> None:
    """Drop the files from the page cache. Raises :class:`PageCacheError` if the kernel keeps many of their pages."""
    for path in paths:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        share = cached_share(path)
        if share > 0.01:
            raise PageCacheError(f"{share:.0%} of a file stayed in the page cache: no cold read can be measured")


def make_warm(paths: Sequence[str]) -> None:
    """Bring the files into the page cache. Raises :class:`PageCacheError` if they do not stay there."""
    for path in paths:
        if cached_share(path) < 1:
            with open(path, "rb", buffering=0) as file:
                buffer = bytearray(8 << 20)
                while file.readinto(buffer):
                    pass
        share = cached_share(path)
        if share < 0.99:
            raise PageCacheError(f"only {share:.0%} of a file stays in the page cache: no warm read can be measured")


def cached_share(path: str) -> float:
    """Which part of a file's pages the page cache holds, from 0 to 1."""
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        resident = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapping)
        result = _libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), resident)
        del anchor  # the mapping cannot be closed while something points into it
        if result != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    return sum(page & 1 for page in resident) / pages
