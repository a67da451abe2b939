"""Plain memory: addresses, views of them, and copies that let other threads run."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator


def memory_at(address: int, size: int) -> memoryview:
    """``size`` bytes of memory at ``address``, writable. The caller keeps their owner alive for as long as the view."""
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


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


def address_of(buffer: bytes | bytearray | memoryview) -> int:
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


def bytes_at(address: int, size: int) -> bytes:
    """A copy of ``size`` bytes of memory."""
    return ctypes.string_at(address, size)


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """For making very many objects without cycles: the collector would look at all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
