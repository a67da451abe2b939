"""Plain memory: addresses, views of them, and copies that let other threads run."""

import ctypes


def memory_at(address: int, size: int) -> memoryview:
    """``size`` bytes of memory at ``address``, writable. The caller keeps their owner alive for as long as the view."""
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def address_of(view: memoryview) -> int:
    """The address of a writable view's first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def copy_memory(target: int, source: int, size: int) -> None:
    """Copy between two addresses that do not overlap; the GIL is not held meanwhile."""
    ctypes.memmove(target, source, size)


def bytes_at(address: int, size: int) -> bytes:
    """A copy of ``size`` bytes of memory."""
    return ctypes.string_at(address, size)
