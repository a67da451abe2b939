"""What I/O past the page cache asks of memory: where a buffer lies, whether it is aligned, buffers that are."""

import contextlib
import mmap

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Address, offset and length of direct I/O are multiples of this.

Never less than a page: the buffered bytes of one write and the direct bytes of another then never share one, so
that neither can overwrite the other in the page cache.
"""

_HUGE_PAGE = 2 << 20


def aligned_buffer(size: int) -> memoryview:
    """A writable buffer of ``size`` zero bytes that direct I/O takes as it is.

    It has pages of its own (nothing else lies on them) and is given back when the last view of it is gone. Large ones
    ask for huge pages: fewer faults when it is first filled, less for the kernel to pin for each transfer.
    """
    whole = max(round_up(size), ALIGNMENT)
    if hasattr(mmap, "MAP_PRIVATE"):
        # Private: a forked child gets a copy, and cannot scribble over bytes on their way to the disk.
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, whole)
    if whole >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


def round_down(value: int) -> int:
    """The last multiple of the alignment that is not above ``value``."""
    return value - value % ALIGNMENT


def round_up(value: int) -> int:
    """The first multiple of the alignment that is not below ``value``."""
    return value + -value % ALIGNMENT
