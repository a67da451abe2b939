"""What I/O past the page cache asks of memory: where a buffer lies, whether it is aligned, buffers that are."""

import contextlib
import ctypes
import mmap

from lastgood.storage.base import Buffer

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


class _BufferInfo(ctypes.Structure):
    """``Py_buffer`` of Python's stable C interface."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("nbytes", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("dimensions", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


# Prototypes of our own: those on ctypes.pythonapi are shared with every other library in the process.
_get_buffer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyBuffer_Release", ctypes.pythonapi))


def address_of(buffer: Buffer) -> int:
    """Where the first byte lies in memory. Works for read-only buffers too, which ``ctypes`` alone cannot ask."""
    info = _BufferInfo()
    _get_buffer(buffer, ctypes.addressof(info), 0)  # raises what the buffer raises
    try:
        return int(info.address or 0)
    finally:
        _release_buffer(ctypes.addressof(info))


def copy_memory(target: int, source: int, nbytes: int) -> None:
    """Copy between two addresses with the interpreter lock released (assigning to a slice would hold it)."""
    ctypes.memmove(target, source, nbytes)
