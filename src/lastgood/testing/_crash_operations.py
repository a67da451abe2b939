"""The operations of a :class:`~lastgood.testing.crash_file_ops.CrashFileOps`, each of them recorded."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lastgood._memory import address_of
from lastgood.storage.file_ops import FileStatus
from lastgood.testing._crash_disk import Change, Image, NamesSynced, Synced
from lastgood.testing._crash_pages import PAGE_SIZE
from lastgood.testing._crash_tree import Node, Tree, failure

_FIRST_DESCRIPTOR = 1_000_000  # none that the operating system would take for one of its own


class Operation(NamedTuple):
    """One call, or one note. ``target`` is what it was about, in words; ``changes`` what it did to the disk."""

    name: str
    target: str
    changes: tuple[Change, ...]
    failed_with: int | None = None
    note: tuple[Any, ...] | None = None


class _Open:
    """An open file description."""

    def __init__(self, node: Node, path: str, *, reads: bool, writes: bool, appends: bool = False) -> None:
        self.node = node
        self.path = path
        self.reads = reads
        self.writes = writes
        self.appends = appends
        self.is_direct = False


class RecordedFiles:
    """:class:`~lastgood.storage.file_ops.FileOps` in memory: the contracts of the operations are those."""

    def __init__(self, image: Image, capacity: int | None, *, has_direct_io: bool) -> None:
        self._tree = Tree(image, capacity)
        self._has_direct_io = has_direct_io
        self._record: list[Operation] = []
        self._open: dict[int, _Open] = {}
        self._next_descriptor = _FIRST_DESCRIPTOR
        self._fsyncs_to_failure: int | None = None
        self._lock = threading.RLock()

    @contextmanager
    def _doing(self, name: str, target: str) -> Iterator[list[Change]]:
        """One operation at a time; the block adds what it changes."""
        with self._lock:
            changes: list[Change] = []
            failed_with: int | None = None
            try:
                yield changes
            except OSError as error:
                failed_with = error.errno
                raise
            finally:
                self._record.append(Operation(name, target, tuple(changes), failed_with))

    def open_exclusive(self, path: str) -> int:
        with self._doing("open_exclusive", path) as changes:
            node, made = self._tree.create(path)
            changes += made
            return self._opened(_Open(node, path, reads=True, writes=True))

    def open_direct(self, path: str, write: bool) -> int:
        with self._doing("open_direct", path):
            if not self._has_direct_io:
                raise failure(errno.EINVAL, path)
            opened = _Open(self._file(path), path, reads=not write, writes=write)
            opened.is_direct = True
            return self._opened(opened)

    def open_read(self, path: str) -> int:
        with self._doing("open_read", path):
            return self._opened(_Open(self._tree.find(path), path, reads=True, writes=False))

    def open_write(self, path: str) -> int:
        with self._doing("open_write", path):
            return self._opened(_Open(self._file(path), path, reads=True, writes=True))

    def open_append(self, path: str) -> int:
        with self._doing("open_append", path) as changes:
            try:
                node = self._file(path)
            except FileNotFoundError:
                node, made = self._tree.create(path)
                changes += made
            return self._opened(_Open(node, path, reads=False, writes=True, appends=True))

    def close(self, descriptor: int) -> None:
        with self._doing("close", self._path_of(descriptor)):
            self._described(descriptor)
            self._release(descriptor)

    def reserve(self, descriptor: int, size: int) -> None:
        with self._doing("reserve", f"{self._path_of(descriptor)} ({size} bytes)") as changes:
            if size <= 0:
                raise failure(errno.EINVAL)
            changes += self._tree.reserve(self._writable(descriptor).node, size)

    def truncate(self, descriptor: int, size: int) -> None:
        with self._doing("truncate", f"{self._path_of(descriptor)} ({size} bytes)") as changes:
            opened = self._described(descriptor)
            if size < 0 or not opened.writes:
                raise failure(errno.EINVAL)
            changes += self._tree.resize(opened.node, size)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        with self._doing("pwrite", f"{self._path_of(descriptor)} ({len(data)} bytes at {offset})") as changes:
            opened = self._writable(descriptor)
            _check_aligned(opened, data, offset)
            if opened.appends:
                offset = len(opened.node.data)
            before = len(changes)
            changes += self._tree.write(opened.node, offset, bytes(data))
            return len(changes[-1].data) if len(changes) > before else 0  # type: ignore[union-attr]

    def pread_into(self, descriptor: int, target: memoryview, offset: int) -> int:
        with self._doing("pread_into", f"{self._path_of(descriptor)} ({len(target)} bytes at {offset})"):
            opened = self._described(descriptor)
            if not opened.reads:
                raise failure(errno.EBADF)
            if opened.node.is_directory and len(target):
                raise failure(errno.EISDIR)
            _check_aligned(opened, target, offset)
            found = opened.node.data[offset : offset + len(target)]
            target[: len(found)] = found
            return len(found)

    def cached_bytes(self, descriptor: int, offset: int, length: int) -> int:
        with self._doing("cached_bytes", self._path_of(descriptor)):
            self._described(descriptor)
            # Nothing ever is: where there is direct I/O, it is used.
            return 0 if self._has_direct_io else length

    def fsync(self, descriptor: int) -> None:
        with self._doing("fsync", self._path_of(descriptor)) as changes:
            node = self._described(descriptor).node
            if node.is_directory:
                changes.append(NamesSynced(node.number))
                return
            fails = self._fsyncs_to_failure == 0
            if self._fsyncs_to_failure is not None:
                self._fsyncs_to_failure = None if fails else self._fsyncs_to_failure - 1
            changes.append(Synced(node.number, fails))
            if fails:
                raise failure(errno.EIO)

    def fsync_directory(self, path: str) -> None:
        with self._doing("fsync_directory", path) as changes:
            changes.append(NamesSynced(self._tree.find_directory(path).number))

    def link(self, existing: str, new: str) -> None:
        with self._doing("link", f"{existing} -> {new}") as changes:
            changes += self._tree.link(existing, new)

    def replace(self, source: str, target: str) -> None:
        with self._doing("replace", f"{source} -> {target}") as changes:
            changes += self._tree.rename(source, target, replace=True)

    def rename_without_replacing(self, source: str, target: str) -> None:
        with self._doing("rename_without_replacing", f"{source} -> {target}") as changes:
            changes += self._tree.rename(source, target, replace=False)

    def unlink(self, path: str) -> None:
        with self._doing("unlink", path) as changes:
            changes += self._tree.unlink(path)

    def make_directory(self, path: str) -> None:
        with self._doing("make_directory", path) as changes:
            changes += self._tree.create(path, is_directory=True)[1]

    def remove_directory(self, path: str) -> None:
        with self._doing("remove_directory", path) as changes:
            changes += self._tree.remove_directory(path)

    def list_directory(self, path: str) -> list[str]:
        with self._doing("list_directory", path):
            return list(self._tree.find_directory(path).entries)

    def status(self, target: str | int) -> FileStatus:
        with self._doing("status", target if isinstance(target, str) else self._path_of(target)):
            node = self._tree.find(target) if isinstance(target, str) else self._described(target).node
            return FileStatus(not node.is_directory, node.is_directory, len(node.data), (1, node.number))

    def available_bytes(self, path: str) -> int | None:
        with self._doing("available_bytes", path):
            self._tree.find(path)
            return None if self._tree.capacity is None else self._tree.available()

    def lock(self, descriptor: int) -> bool:
        with self._doing("lock", self._path_of(descriptor)):
            node = self._described(descriptor).node
            self._unlock(node, descriptor)
            if node.owner is not None or node.sharers:
                return False
            node.owner = descriptor
            return True

    def lock_shared(self, descriptor: int) -> bool:
        with self._doing("lock_shared", self._path_of(descriptor)):
            node = self._described(descriptor).node
            self._unlock(node, descriptor)
            if node.owner is not None:
                return False
            node.sharers.add(descriptor)
            return True

    # Descriptors

    def _opened(self, opened: _Open) -> int:
        opened.node.users += 1
        descriptor = self._next_descriptor
        self._next_descriptor += 1
        self._open[descriptor] = opened
        return descriptor

    def _release(self, descriptor: int) -> None:
        node = self._open.pop(descriptor).node
        self._unlock(node, descriptor)
        node.users -= 1
        self._tree.let_go(node)

    def _file(self, path: str) -> Node:
        found = self._tree.find(path)
        if found.is_directory:
            raise failure(errno.EISDIR, path)
        return found

    def _path_of(self, descriptor: int) -> str:
        opened = self._open.get(descriptor)
        return f"descriptor {descriptor}" if opened is None else opened.path

    def _described(self, descriptor: int) -> _Open:
        try:
            return self._open[descriptor]
        except KeyError:
            raise failure(errno.EBADF) from None

    def _writable(self, descriptor: int) -> _Open:
        opened = self._described(descriptor)
        if not opened.writes:
            raise failure(errno.EBADF)
        return opened

    def _unlock(self, node: Node, descriptor: int) -> None:
        node.sharers.discard(descriptor)
        if node.owner == descriptor:
            node.owner = None


def _check_aligned(opened: _Open, buffer: memoryview, offset: int) -> None:
    if opened.is_direct and any(number % PAGE_SIZE for number in (address_of(buffer), offset, len(buffer))):
        raise failure(errno.EINVAL)
