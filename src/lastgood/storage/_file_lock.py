"""One writer of a file at a time, on one machine or on all that share a file system with locks.

The lock lies on a small file beside the one to be written, and lives as long as the process that holds it: the kernel
frees it. What a dead holder leaves behind is an empty file, which the next holder takes over and removes.
"""

import contextlib
import errno
import os

from lastgood._events import logger
from lastgood.storage.file_ops import NOT_SUPPORTED, FileOps

_ATTEMPTS = 64


def lock_file(path: str) -> str:
    """The file that the lock of ``path`` lies on."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.lock")


def is_lock(name: str) -> bool:
    """Whether a name in a directory is that of a lock."""
    return name.startswith(".") and name.endswith(".lock")


class FileLock:
    """A :class:`~lastgood.storage.base.StorageLock` on a local file; ``descriptor`` is ``None`` where there are no
    locks."""

    def __init__(self, ops: FileOps, path: str, descriptor: int | None, *, shared: bool = False) -> None:
        self._ops = ops
        self._path = path
        self._descriptor = descriptor
        self._shared = shared

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        # Removed while it is still held: who waits for it then finds that its file has no name, and makes a new one.
        try:
            if not self._shared or self._is_last(descriptor):
                self._ops.unlink(self._path)
        except OSError as error:
            logger.warning("could not remove %s (%s): the next save of this name will", self._path, error)
        with contextlib.suppress(OSError):
            self._ops.close(descriptor)

    def _is_last(self, descriptor: int) -> bool:
        """Whether this was the last to share it; then it has the lock for itself. The last of several finds it so."""
        return self._ops.lock(descriptor) and _is_named(self._ops, self._path, descriptor)


def try_file_lock(ops: FileOps, path: str, *, shared: bool = False) -> FileLock | None:
    """The lock of the file ``path``, whose directory must be there; ``None`` if another writer, alive, has it."""
    name = lock_file(path)
    for _ in range(_ATTEMPTS):
        descriptor = _open(ops, name)
        try:
            if not (ops.lock_shared(descriptor) if shared else ops.lock(descriptor)):
                ops.close(descriptor)
                return None
            if _is_named(ops, name, descriptor):
                return FileLock(ops, name, descriptor, shared=shared)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED and error.errno != errno.ENOLCK:
                ops.close(descriptor)
                raise
            # No locks on this file system, as on some networks: then nobody else can hold one either.
            logger.info("no locks for %s (%s): two jobs that save there at once are not kept apart", path, error)
            with contextlib.suppress(OSError):
                ops.unlink(name)
            ops.close(descriptor)
            return FileLock(ops, name, None)
        ops.close(descriptor)
    return None  # others go on taking it


def is_held(ops: FileOps, name: str) -> bool | None:
    """Whether a living process holds the lock of this file; ``None`` where that cannot be told.

    The kernel frees a lock when its holder dies, so whoever can take it knows that nobody has it.
    """
    try:
        descriptor = ops.open_write(name)
    except OSError:
        return None
    try:
        return not ops.lock(descriptor)
    except OSError:
        return None
    finally:
        ops.close(descriptor)


def clear_free_lock(ops: FileOps, name: str) -> None:
    """Remove the file of a lock that nobody holds. What cannot be told or removed stays, in silence."""
    try:
        descriptor = ops.open_write(name)
    except OSError:
        return
    try:
        if ops.lock(descriptor) and _is_named(ops, name, descriptor):
            ops.unlink(name)
    except OSError as error:
        logger.debug("left %s alone: %s", name, error)
    finally:
        ops.close(descriptor)


def _open(ops: FileOps, name: str) -> int:
    for _ in range(_ATTEMPTS):
        try:
            return ops.open_exclusive(name)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # released this very moment
                return ops.open_write(name)
    return ops.open_write(name)


def _is_named(ops: FileOps, name: str, descriptor: int) -> bool:
    """False if the former holder removed the file between our opening it and our locking it."""
    try:
        return ops.status(name).identity == ops.status(descriptor).identity
    except FileNotFoundError:
        return False
