"""The one way a local file comes into being: whole and durable under its name, or not at all.

A file is written under a temporary name next to its final one, fsynced, published by one atomic operation on names,
and its directory fsynced. The temporary is locked while its writer lives, so that debris can be told from a file that
somebody is still writing, on whichever machine restart or in whichever process the question comes up.
"""

import contextlib
import errno
import os
import re
import secrets
import threading

from lastgood._events import logger
from lastgood._memory import address_of
from lastgood.errors import ConfigError, StorageError
from lastgood.storage._descriptors import SharedDescriptors
from lastgood.storage._direct_io import ALIGNMENT, round_down
from lastgood.storage._local_errors import (
    UNTOUCHED,
    name_taken,
    not_enough_space,
    storage_error,
    translated,
    wrote_nothing,
)
from lastgood.storage.file_ops import NOT_SUPPORTED, FileOps

_LARGEST_WRITE = 16 << 20
_SMALLEST_DIRECT_WRITE = 64 << 10
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_RESERVE_ATTEMPTS = 16
_CREATE_ATTEMPTS = 64
_REPLACED = "The new file has its name and is whole, but a power cut may bring back the one before: save again."
_NAMED = "The new file has its name and is whole, but a power cut may take it away: save once more, to another path."


def is_temporary(name: str) -> bool:
    """Whether a name in a directory is that of a file being written, or left behind by a dead writer."""
    return _TEMPORARY.fullmatch(name) is not None


def sync_directory(ops: FileOps, directory: str) -> None:
    """Make the names in ``directory`` durable, where the file system knows of such a thing."""
    try:
        ops.fsync_directory(directory)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


class DurableWrite:
    """A :class:`~lastgood.storage.base.StreamedWrite` to a local file; made by :func:`begin_durable_write`."""

    def __init__(self, ops: FileOps, path: str, temporary: str, descriptor: int, size: int) -> None:
        self._ops = ops
        self._path = path
        self._temporary = temporary
        self._size = size
        self._descriptor = descriptor
        self._descriptors = SharedDescriptors(ops, path, descriptor)
        self._direct: int | None = None
        self._direct_allowed = size >= _SMALLEST_DIRECT_WRITE
        self._lock = threading.Lock()
        self._state = "writing"  # then "durable", then "ended"; whatever fails goes to "ended" at once

    def write_at(self, offset: int, data: memoryview) -> None:
        if self._state != "writing" and not self._descriptors.closed:
            raise ConfigError(f"write_at after make_durable, on {self._path}", path=self._path)
        if offset < 0 or offset + data.nbytes > self._size:
            raise ConfigError(
                f"{data.nbytes} bytes at {offset} do not fit {self._path}, which was begun with {self._size} bytes",
                path=self._path,
            )
        if not data.nbytes:
            return
        with self._descriptors.in_use(), translated("writing", self._path, phase="write"):
            self._write_all(offset, data.cast("B"))

    def _write_all(self, offset: int, data: memoryview) -> None:
        address = address_of(data)
        done = 0
        while done < len(data) and not self._descriptors.closed:
            descriptor, length = self._route(address + done, offset + done, len(data) - done)
            try:
                written = self._ops.pwrite(descriptor, data[done : done + length], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if descriptor == self._direct and error.errno in NOT_SUPPORTED:
                    self._give_up_direct(error)
                    continue
                raise self._write_error(error) from error
            if written <= 0:
                raise wrote_nothing("writing", self._path, phase="write", safe=UNTOUCHED)
            done += written
        if done < len(data):
            raise ConfigError(f"{self._path} was aborted while a thread was writing to it", path=self._path)

    def _route(self, address: int, offset: int, length: int) -> tuple[int, int]:
        """Through which descriptor the next bytes go, and how many of them.

        Direct writes take whole aligned blocks, buffered ones the rest, up to the next place where direct is possible.
        """
        length = min(length, _LARGEST_WRITE)
        before = -offset % ALIGNMENT
        if (address - offset) % ALIGNMENT == 0 and length - before >= _SMALLEST_DIRECT_WRITE:
            direct = self._direct_descriptor()
            if direct is not None:
                return (self._descriptor, before) if before else (direct, round_down(length))
        return self._descriptor, length

    def _direct_descriptor(self) -> int | None:
        with self._lock:
            if self._direct is None and self._direct_allowed:
                try:
                    self._direct = self._ops.open_direct(self._temporary, write=True)
                except OSError as error:
                    self._give_up_direct(error)
                else:
                    self._descriptors.add(self._direct)
            return self._direct if self._direct_allowed else None

    def _give_up_direct(self, error: OSError) -> None:
        self._direct_allowed = False
        logger.info("no direct I/O for %s (%s): writing through the page cache, which is slower", self._path, error)

    def _write_error(self, error: OSError) -> StorageError:
        if error.errno != errno.ENOSPC:
            return storage_error(error, "writing", self._path, phase="write", safe=UNTOUCHED)
        try:
            available = self._ops.available_bytes(os.path.dirname(self._path))
        except OSError:
            available = None
        return not_enough_space(self._path, self._size, available)

    def make_durable(self) -> None:
        if self._state == "durable":
            return
        with self._descriptors.in_use(), translated("fsyncing", self._path, phase="make durable"):
            self._state = "ended"  # until fsync has said otherwise: nothing may write or fsync again after a failure
            try:
                self._ops.fsync(self._descriptor)
            except BaseException:
                self._abandon()
                raise
            self._state = "durable"

    def commit(self, *, replace: bool = True) -> None:
        self.make_durable()
        with self._descriptors.in_use():
            try:
                with translated("publishing", self._path, phase="publish"):
                    if replace:
                        self._ops.replace(self._temporary, self._path)
                    else:
                        publish_if_absent(self._ops, self._temporary, self._path)
            except BaseException:
                self._abandon()
                raise
            self._state = "ended"
            self._descriptors.close()
            safe = _REPLACED if replace else _NAMED
            with translated("fsyncing the directory of", self._path, phase="publish", safe=safe):
                sync_directory(self._ops, os.path.dirname(self._path))

    def abort(self) -> None:
        if not self._descriptors.closed:
            self._abandon()

    def _abandon(self) -> None:
        self._state = "ended"
        try:
            self._ops.unlink(self._temporary)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("could not remove %s (%s): the next save of this name will", self._temporary, error)
        self._descriptors.close()


def publish_if_absent(ops: FileOps, temporary: str, path: str) -> None:
    """Give ``temporary`` the name ``path`` in one step that fails if the name is taken."""
    try:
        ops.link(temporary, path)
    except FileExistsError as error:
        # Over a network a link may be made, its answer lost, and the question asked again.
        if not _same_file(ops, temporary, path):
            raise name_taken(path) from error
    except OSError as error:
        if error.errno not in NOT_SUPPORTED and error.errno != errno.EPERM:
            raise
        _rename_if_absent(ops, temporary, path)
        return
    try:
        ops.unlink(temporary)
    except OSError as error:
        logger.warning("%s is published, but %s stays behind (%s)", path, temporary, error)


def _rename_if_absent(ops: FileOps, temporary: str, path: str) -> None:
    try:
        ops.rename_without_replacing(temporary, path)
    except FileExistsError as error:
        raise name_taken(path) from error
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        raise StorageError(
            f"publishing {path} failed: its file system has neither hard links nor a rename that never replaces, so "
            f"another's file of this name could be lost. {UNTOUCHED} Choose a path on another file system.",
            errno=error.errno,
            path=path,
            phase="publish",
        ) from error


def _same_file(ops: FileOps, first: str, second: str) -> bool:
    try:
        return ops.status(first).identity == ops.status(second).identity
    except OSError:
        return False


def begin_durable_write(ops: FileOps, path: str, size: int) -> DurableWrite:
    """Start a local file of exactly ``size`` bytes; ``path`` is absolute. See ``StorageBackend.begin``."""
    directory, name = os.path.split(path)
    with translated("beginning", path, phase="begin"):
        refuse_directory(ops, path)
        existing, missing = existing_part(ops, directory, path)
        if not missing:
            clear_abandoned(ops, directory, name)
        available = ops.available_bytes(existing)
        if available is not None and size > available:
            raise not_enough_space(path, size, available)
        make_directories(ops, existing, missing)
        temporary, descriptor = _create_temporary(ops, directory, name)
        write = DurableWrite(ops, path, temporary, descriptor, size)
        try:
            _reserve(ops, descriptor, path, size, existing)
        except BaseException:
            write.abort()
            raise
        return write


def refuse_directory(ops: FileOps, path: str) -> None:
    """Raise ``IsADirectoryError`` if that is what stands at ``path``."""
    try:
        status = ops.status(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if status.is_directory:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def existing_part(ops: FileOps, directory: str, path: str) -> tuple[str, list[str]]:
    """The deepest directory of ``directory`` that is there, and those below it that are not, outermost first."""
    missing: list[str] = []
    existing = directory
    while True:
        try:
            status = ops.status(existing)
        except (FileNotFoundError, NotADirectoryError):
            parent = os.path.dirname(existing)
            if parent == existing:
                raise
            missing.insert(0, existing)
            existing = parent
            continue
        if not status.is_directory:
            raise StorageError(
                f"{path} cannot be written: {existing} is a file, not a directory. {UNTOUCHED} Choose another path.",
                errno=errno.ENOTDIR,
                path=path,
                phase="begin",
            )
        return existing, missing


def make_directories(ops: FileOps, existing: str, missing: list[str]) -> None:
    """Make ``missing``, each durable before there is anything in it.

    So at most the deepest directory there is can be one whose maker was killed before its name was durable: its
    parent is fsynced here too, or a power cut could take away what is about to be promised.
    """
    parent = os.path.dirname(existing)
    if parent != existing:
        # Where that is forbidden, the parent may be passed through but not listed: somebody else made what is in it.
        with contextlib.suppress(PermissionError):
            sync_directory(ops, parent)
    for directory in missing:
        try:
            ops.make_directory(directory)
        except FileExistsError:
            if not ops.status(directory).is_directory:
                raise
        sync_directory(ops, os.path.dirname(directory))


def clear_abandoned(ops: FileOps, directory: str, name: str | None = None) -> None:
    """Remove the temporaries of ``name`` (of every name) whose writers are dead.

    What cannot be told or removed stays, in silence.
    """
    try:
        entries = ops.list_directory(directory)
    except OSError:
        return
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match is not None and name in (None, match["name"]):
            _remove_if_abandoned(ops, os.path.join(directory, entry))


def _remove_if_abandoned(ops: FileOps, temporary: str) -> None:
    try:
        descriptor = ops.open_write(temporary)  # some network file systems lock only what is open for writing
    except OSError:
        return
    try:
        if ops.lock(descriptor):
            ops.unlink(temporary)
            logger.info("removed %s, left behind by a writer that died", temporary)
    except OSError as error:
        logger.debug("left %s alone: %s", temporary, error)
    finally:
        ops.close(descriptor)


def _create_temporary(ops: FileOps, directory: str, name: str) -> tuple[str, int]:
    for _ in range(_CREATE_ATTEMPTS):
        temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = ops.open_exclusive(temporary)
        except FileExistsError:
            continue
        try:
            if _hold(ops, temporary, descriptor):
                return temporary, descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                ops.unlink(temporary)
            ops.close(descriptor)
            raise
        ops.close(descriptor)
    raise OSError(errno.EBUSY, "other processes go on removing the temporary as soon as it is made", directory)


def _hold(ops: FileOps, temporary: str, descriptor: int) -> bool:
    """Lock a new temporary; False if somebody who cleared up found it before it was locked, and removed it."""
    try:
        if not ops.lock(descriptor):
            return False
    except OSError:
        return True  # no locks here: then nobody can find it unlocked either
    try:
        return ops.status(temporary).identity == ops.status(descriptor).identity
    except FileNotFoundError:
        return False


def _reserve(ops: FileOps, descriptor: int, path: str, size: int, existing: str) -> None:
    """Give the file its length and, where the file system can, its space.

    The length matters for speed too: direct writes that make a file longer are done one at a time.
    """
    if not size:
        return
    for _ in range(_RESERVE_ATTEMPTS):
        try:
            ops.reserve(descriptor, size)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise not_enough_space(path, size, ops.available_bytes(existing)) from error
            if error.errno not in NOT_SUPPORTED:
                raise
            break
        else:
            return
    ops.truncate(descriptor, size)
