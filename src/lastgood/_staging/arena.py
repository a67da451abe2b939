"""Shared memory for snapshots: one anonymous file, mapped once, used again and again.

A memfd belongs to no file system, so that a container's small /dev/shm does not matter, and it is gone with the last
process that has it open.
"""

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import weakref
from collections.abc import Callable

from lastgood import _events
from lastgood._memory import memory_at
from lastgood._staging.free_memory import available_memory
from lastgood.errors import ArenaMemoryError, ConfigError
from lastgood.storage._direct_io import round_up

_MADV_POPULATE_WRITE = 23  # Linux 5.14 and newer
_POPULATED_AT_ONCE = 64 << 20
_KEPT_FREE = 64 << 20
"""What a snapshot leaves of the memory that is free: taking all of it would get somebody killed."""

_numbers = itertools.count(1)


class Arena:
    """``size`` bytes of shared memory. ``number`` tells it from every other arena of this process, past ones too.

    The first ``reserved`` bytes are known to be there: touching them cannot end in SIGBUS.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError(
                "asynchronous checkpoints need memory that processes share by descriptor (memfd), which this platform "
                "does not have; use make_sync_checkpointer"
            )
        self.number = next(_numbers)
        self.size = 0
        self.reserved = 0
        self.content: tuple[int, int] | None = None
        """What its user has noted about the bytes in it: the plan by which it is laid out, and its revision."""
        self._mapping: mmap.mmap | None = None
        self.descriptor = os.memfd_create("lastgood-arena")
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)
        self._address = 0

    @property
    def address(self) -> int:
        """Where the first byte lies. Another one after :meth:`resize`."""
        return self._address

    def memory(self, offset: int, size: int) -> memoryview:
        """A view of bytes. Whoever keeps it must not use it after :meth:`resize` or :meth:`close`."""
        return memory_at(self._address + offset, size)

    def resize(self, size: int) -> None:
        """Change the size (rounded up to pages). Bytes that stay keep their content."""
        size = round_up(size)
        os.ftruncate(self.descriptor, size)
        self._unmap()
        self._mapping = mmap.mmap(self.descriptor, size)
        with contextlib.suppress(OSError):  # a kernel built without them
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(self._mapping)
        self._address = ctypes.addressof(first)
        self.size = size
        self.reserved = min(self.reserved, size)

    def reserve(self, wanted: int | None = None) -> None:
        """Make sure that the first ``wanted`` bytes (all, by default) can be touched, and touch them.

        Raises :class:`~lastgood.errors.ArenaMemoryError` when memory is short, as far as this can be known beforehand.
        """
        end = self.size if wanted is None else min(round_up(wanted), self.size)
        missing = end - self.reserved
        if missing <= 0:
            return
        _refuse_if_short(missing)
        with _events.phase("reserve", "shared memory", nbytes=missing):
            while self.reserved < end:
                step = min(_POPULATED_AT_ONCE, end - self.reserved)
                try:
                    self._populate(self.reserved, step)
                except OSError as error:
                    raise ArenaMemoryError(
                        f"the operating system has no {step >> 20} MiB of memory for a snapshot ({error}); nothing of "
                        "it was staged, earlier checkpoints are untouched. Free some memory, or save synchronously.",
                        phase="reserve",
                    ) from error
                self.reserved += step

    def _populate(self, offset: int, size: int) -> None:
        if _madvise is not None:
            if _madvise(self._address + offset, size, _MADV_POPULATE_WRITE) == 0:
                return
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(number, os.strerror(number))
        os.posix_fallocate(self.descriptor, offset, size)

    def close(self, *, unused: bool = True) -> None:
        """Give the memory back: at once if it is ``unused``, or else when no other process has it mapped any more."""
        self._unmap()
        if unused and self._close_descriptor.alive:
            os.ftruncate(self.descriptor, 0)
        self._close_descriptor()
        self.descriptor = -1
        self.size = self.reserved = 0

    def _unmap(self) -> None:
        mapping, self._mapping = self._mapping, None
        self._address = 0
        if mapping is not None:
            mapping.close()


def _refuse_if_short(missing: int) -> None:
    available = available_memory()
    if available is not None and missing + _KEPT_FREE > available:
        raise ArenaMemoryError(
            f"a snapshot needs {missing >> 20} MiB of memory more, and {available >> 20} MiB are free (on the machine, "
            "or within this job's cgroup); nothing was staged, earlier checkpoints are untouched. Give the job more "
            "memory, or save synchronously (make_sync_checkpointer), which needs tens of MiB.",
            phase="reserve",
        )


def _find_madvise() -> Callable[[int, int, int], int] | None:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True)(
            ("madvise", library)
        )
    except (AttributeError, OSError):
        return None


_madvise = _find_madvise()
