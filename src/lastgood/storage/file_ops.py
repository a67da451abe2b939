"""The only door between storage code and the operating system.

Storage code makes decisions and calls :class:`FileOps`; an implementation makes none and does what it is told, one
system call a method. So a test can put itself in the door: record the calls, fail one of them, or keep what a power
cut would have kept. Every failure is the plain ``OSError``; what it means is for the caller to say.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import sys
from typing import NamedTuple, Protocol

if sys.platform != "win32":
    import fcntl

NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""How file systems and platforms say that they do not have what they were asked for."""


class FileStatus(NamedTuple):
    """What storage needs to know of a file. Two names with the same ``identity`` are the same file."""

    is_file: bool
    is_directory: bool
    size: int
    identity: tuple[int, int]


class FileOps(Protocol):
    """System calls on files and directories. Paths are strings, descriptors are integers owned by the caller.

    Reads and writes may be short, as those of the operating system are: to continue is the caller's business, and so
    is ``InterruptedError``. All methods may be called from several threads.
    """

    def open_exclusive(self, path: str) -> int:
        """Create a file for reading and writing; ``FileExistsError`` if the name is taken."""

    def open_direct(self, path: str, write: bool) -> int:
        """Open an existing file past the page cache (write only if ``write``, else read only).

        Any ``OSError`` may mean that the file system does not offer this. Where it does, buffers, offsets and lengths
        must be aligned, and some file systems say so only when the first read or write fails with ``EINVAL``.
        """

    def open_read(self, path: str) -> int:
        """Open an existing file for reading."""

    def open_write(self, path: str) -> int:
        """Open an existing file for reading and writing."""

    def open_append(self, path: str) -> int:
        """Open a file, made if it is not there, so that each write goes to its end wherever else it is aimed."""

    def close(self, descriptor: int) -> None:
        """Close; the descriptor is gone even when this raises."""

    def reserve(self, descriptor: int, size: int) -> None:
        """Allocate the first ``size`` bytes of a file, which is at least that long afterwards, without writing them.

        Raises ``OSError`` with one of :data:`NOT_SUPPORTED` where the file system or the platform cannot.
        """

    def truncate(self, descriptor: int, size: int) -> None:
        """Set a file's length; what is added reads as zeros."""

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write at ``offset``; returns how many bytes were taken."""

    def pread_into(self, descriptor: int, target: memoryview, offset: int) -> int:
        """Read from ``offset`` into ``target``; returns how many bytes came, 0 at the end of the file."""

    def cached_bytes(self, descriptor: int, offset: int, length: int) -> int:
        """How many of the ``length`` bytes from ``offset`` on stand in the page cache without a gap.

        Reads nothing, and starts no read. Raises ``OSError`` where this cannot be asked. A kernel that keeps it from
        those who may only read the file says that all of them do.
        """

    def fsync(self, descriptor: int) -> None:
        """Make a file's bytes and length survive a power cut. After a failure the bytes may be lost for good."""

    def fsync_directory(self, path: str) -> None:
        """Make the names in a directory survive a power cut."""

    def link(self, existing: str, new: str) -> None:
        """Give a file a second name; ``FileExistsError`` if that is taken."""

    def replace(self, source: str, target: str) -> None:
        """Rename atomically, taking the place of a file that has the name ``target``."""

    def rename_without_replacing(self, source: str, target: str) -> None:
        """Rename atomically; ``FileExistsError`` if ``target`` is taken.

        Raises ``OSError`` with one of :data:`NOT_SUPPORTED` where the file system or the platform cannot.
        """

    def unlink(self, path: str) -> None:
        """Remove a file's name."""

    def make_directory(self, path: str) -> None:
        """Make one directory; its parent must exist."""

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory; ``OSError`` with ``ENOTEMPTY`` (or ``EEXIST``) if something is in it."""

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, in no order."""

    def status(self, target: str | int) -> FileStatus:
        """What stands at a path (symbolic links followed), or behind a descriptor."""

    def available_bytes(self, path: str) -> int | None:
        """What an ordinary user may still write to the file system of ``path``; ``None`` if it does not tell.

        Quotas are not in this figure.
        """

    def lock(self, descriptor: int) -> bool:
        """Take the file's exclusive lock without waiting; returns whether it was free.

        The lock lives as long as the descriptor, so the kernel frees it when the process dies. Raises ``OSError``
        where there are no locks. A descriptor that holds the shared lock gives that up, even if this returns False.
        """

    def lock_shared(self, descriptor: int) -> bool:
        """Like :meth:`lock`, for one that any number of holders may have, but none while somebody has it alone."""


def _not_supported(what: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, f"{what} is not available on this platform")


_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
# Below, file offsets are 64 bits wide; where the C library's own are not, it is left alone.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" and sys.maxsize > 2**32 else None
if _libc is not None:
    _map = ctypes.CFUNCTYPE(
        ctypes.c_void_p,
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
        use_errno=True,
    )(("mmap", _libc))
_MAP_FAILED = ctypes.c_void_p(-1).value
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class _CacheRange(ctypes.Structure):
    """``struct cachestat_range`` of the kernel."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheState(ctypes.Structure):
    """``struct cachestat`` of the kernel, in pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


_CACHESTAT = 451  # the same number on every architecture; Linux 6.5 and newer


def _count_cached_pages(descriptor: int, offset: int, length: int) -> int | None:
    """How many pages of a range are in memory, wherever in it; ``None`` where the kernel cannot say."""
    if _libc is None:
        return None
    state = _CacheState()
    asked = _CacheRange(offset, length)
    result = _libc.syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(descriptor),
        ctypes.byref(asked),
        ctypes.byref(state),
        ctypes.c_uint(0),
    )
    return int(state.cached) if result == 0 else None


def _cached_pages(descriptor: int, offset: int, length: int) -> int:
    """How many pages of a file, from ``offset`` (where a page begins) on, are in memory without a gap."""
    if _libc is None:
        raise _not_supported("mincore")
    resident = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    mapping = _map(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if mapping == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        _call_libc("mincore", ctypes.c_void_p(mapping), ctypes.c_size_t(length), resident)
    finally:
        _call_libc("munmap", ctypes.c_void_p(mapping), ctypes.c_size_t(length))
    first_gap = resident.raw.find(b"\0")
    return len(resident) if first_gap < 0 else first_gap


def _call_libc(name: str, *arguments: object, path: str | None = None) -> None:
    """Call a function of the C library that returns -1 and sets errno on failure."""
    function = getattr(_libc, name, None)
    if function is None:
        raise _not_supported(name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


class OsFileOps:
    """:class:`FileOps` on the machine's own file systems."""

    def open_exclusive(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC, 0o666)

    def open_direct(self, path: str, write: bool) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        if not direct:
            raise _not_supported("direct I/O")
        return os.open(path, (os.O_WRONLY if write else os.O_RDONLY) | direct | _CLOSE_ON_EXEC)

    def open_read(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC)

    def open_write(self, path: str) -> int:
        return os.open(path, os.O_RDWR | _CLOSE_ON_EXEC)

    def open_append(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _CLOSE_ON_EXEC, 0o666)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def reserve(self, descriptor: int, size: int) -> None:
        # Not os.posix_fallocate: where the file system cannot, the C library would write the file full of zeros.
        _call_libc("fallocate", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))

    def truncate(self, descriptor: int, size: int) -> None:
        os.truncate(descriptor, size)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def pread_into(self, descriptor: int, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [target], offset)
        data = os.pread(descriptor, len(target), offset)
        target[: len(data)] = data
        return len(data)

    def cached_bytes(self, descriptor: int, offset: int, length: int) -> int:
        # Not preadv with RWF_NOWAIT: where bytes are missing it starts to read ahead, and a direct read that follows
        # then shares the device with a second copy of itself.
        before = offset % mmap.PAGESIZE
        pages = -(-(before + length) // mmap.PAGESIZE)
        count = _count_cached_pages(descriptor, offset - before, before + length)
        if count == 0:
            return 0
        if count == pages:
            return length
        # Some of them: where the first gap is takes a mapping to find out.
        cached = _cached_pages(descriptor, offset - before, before + length) * mmap.PAGESIZE - before
        return min(max(0, cached), length)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def fsync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            with contextlib.suppress(OSError):  # nothing was written through it, and what counts has been said
                os.close(descriptor)

    def link(self, existing: str, new: str) -> None:
        os.link(existing, new)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def rename_without_replacing(self, source: str, target: str) -> None:
        names = os.fsencode(source), os.fsencode(target)
        _call_libc("renameat2", _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE, path=target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def make_directory(self, path: str) -> None:
        os.mkdir(path)

    def remove_directory(self, path: str) -> None:
        os.rmdir(path)

    def list_directory(self, path: str) -> list[str]:
        return os.listdir(path)

    def status(self, target: str | int) -> FileStatus:
        result = os.stat(target)
        return FileStatus(
            is_file=stat.S_ISREG(result.st_mode),
            is_directory=stat.S_ISDIR(result.st_mode),
            size=result.st_size,
            identity=(result.st_dev, result.st_ino),
        )

    def available_bytes(self, path: str) -> int | None:
        result = os.statvfs(path)
        # A file system without a limit of its own (tmpfs with size=0, some network ones) reports no blocks at all.
        return result.f_bavail * result.f_frsize if result.f_blocks else None

    def lock(self, descriptor: int) -> bool:
        return _flock(descriptor, fcntl.LOCK_EX)

    def lock_shared(self, descriptor: int) -> bool:
        return _flock(descriptor, fcntl.LOCK_SH)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
