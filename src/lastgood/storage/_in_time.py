"""A backend on a clock: no call keeps its caller waiting for ever, whatever the device or the network does.

Each call runs on a daemon thread, so that one which never comes back does not keep the interpreter from exiting either.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

from lastgood._events import logger
from lastgood._threads import call_with_timeout
from lastgood.errors import StorageError
from lastgood.storage.base import Buffer, StorageBackend, StorageLock, StoredFile, StreamedWrite

Result = TypeVar("Result")

_NOTHING = "Nothing was published; earlier checkpoints are untouched."
_UNKNOWN = "Whether it was published is not known: it is there whole, or what was there before is."
_READ_ONLY = "Nothing was changed."


class StorageInTime:
    """The same :class:`~lastgood.storage.base.StorageBackend`, whose calls end within ``timeout_secs`` each.

    A call that does not raises :class:`~lastgood.errors.StorageError`. The exceptions are ``write_at`` of what
    :meth:`begin_unwatched` gives and ``read_into`` of what :meth:`open_unwatched` does: whoever transfers with several
    threads watches over them.
    """

    def __init__(self, storage: StorageBackend, timeout_secs: float) -> None:
        self._storage = storage
        self._timeout_secs = timeout_secs

    def begin(self, path: str, size: int) -> StreamedWrite:
        return _WriteInTime(self._begin(path, size), path, self._call)

    def begin_unwatched(self, path: str, size: int) -> StreamedWrite:
        """Begin, make durable and end in time; the calls of ``write_at`` are for the caller to watch over."""
        return _UnwatchedWrite(self._begin(path, size), path, self._call)

    def _begin(self, path: str, size: int) -> StreamedWrite:
        def undo(write: StreamedWrite) -> None:
            _WriteInTime(write, path, self._call).abort()

        return self._obtain(lambda: self._storage.begin(path, size), undo, "begin", path, _NOTHING)

    def try_lock(self, path: str, *, shared: bool = False) -> StorageLock | None:
        def undo(lock: StorageLock | None) -> None:
            if lock is not None:
                lock.release()

        lock = self._obtain(lambda: self._storage.try_lock(path, shared=shared), undo, "lock", path, _NOTHING)
        return None if lock is None else _LockInTime(lock, path, self._call)

    def put(self, path: str, data: Buffer) -> None:
        self._call(lambda: self._storage.put(path, data), "put", path, _UNKNOWN)

    def put_if_absent(self, path: str, data: Buffer) -> None:
        self._call(lambda: self._storage.put_if_absent(path, data), "put", path, _UNKNOWN)

    def append(self, path: str, data: Buffer) -> None:
        self._call(lambda: self._storage.append(path, data), "append", path, "Some of it may have been added.")

    def open(self, path: str) -> StoredFile:
        return _FileInTime(self._open(path), self._call)

    def open_unwatched(self, path: str) -> StoredFile:
        """Open in time; the reads are for the caller to watch over."""
        return _UnwatchedFile(self._open(path), self._call)

    def _open(self, path: str) -> StoredFile:
        return self._obtain(lambda: self._storage.open(path), lambda file: file.close(), "open", path, _READ_ONLY)

    def exists(self, path: str) -> bool:
        return self._call(lambda: self._storage.exists(path), "exists", path, _READ_ONLY)

    def list(self, path: str) -> list[str]:
        return self._call(lambda: self._storage.list(path), "list", path, _READ_ONLY)

    def delete(self, path: str) -> None:
        self._call(lambda: self._storage.delete(path), "delete", path, "The file may still be there.")

    def rename(self, path: str, new_path: str) -> None:
        safe = "It has either its old name or the new one."
        self._call(lambda: self._storage.rename(path, new_path), "rename", path, safe)

    def settle(self, path: str) -> None:
        self._call(lambda: self._storage.settle(path), "settle", path, _READ_ONLY)

    def has_writers(self, path: str) -> bool:
        return self._call(lambda: self._storage.has_writers(path), "list", path, _READ_ONLY)

    def delete_directory(self, path: str) -> bool:
        safe = "The directory may still be there."
        return self._call(lambda: self._storage.delete_directory(path), "delete", path, safe)

    def look_up(self, question: Callable[[StorageBackend], Result], path: str) -> Result:
        """What several calls that only read find out, all within the time of one: a thread for each would cost more."""
        return self._call(lambda: question(self._storage), "look up", path, _READ_ONLY)

    def _obtain(
        self, function: Callable[[], Result], undo: Callable[[Result], None], phase: str, path: str, safe: str
    ) -> Result:
        """The result of ``function``; one that comes too late is undone."""
        lock = threading.Lock()
        results: list[Result] = []
        given_up = False

        def obtain() -> None:
            result = function()
            with lock:
                results.append(result)
                late = given_up
            if late:
                undo(result)

        try:
            self._call(obtain, phase, path, safe)
        except BaseException:
            with lock:
                given_up = True
                unwanted = list(results)
            for result in unwanted:
                undo(result)
            raise
        return results[0]

    def _call(self, function: Callable[[], Result], phase: str, path: str, safe: str) -> Result:
        def timed_out() -> StorageError:
            return StorageError(
                f"storage did not answer within {self._timeout_secs:g} s ({phase} of {path}) and was given up. {safe} "
                "Look at the device or the network behind this path.",
                path=path,
                phase=phase,
            )

        return call_with_timeout(function, self._timeout_secs, timed_out, name=phase.replace(" ", "-"))


_Call = Callable[[Callable[[], None], str, str, str], None]


class _WriteInTime:
    def __init__(self, write: StreamedWrite, path: str, call: _Call) -> None:
        self._write = write
        self._path = path
        self._call = call
        self._committed = False

    def write_at(self, offset: int, data: memoryview) -> None:
        self._call(lambda: self._write.write_at(offset, data), "write", self._path, _NOTHING)

    def make_durable(self) -> None:
        self._call(self._write.make_durable, "make durable", self._path, _NOTHING)

    def commit(self, *, replace: bool = True) -> None:
        self._call(lambda: self._write.commit(replace=replace), "commit", self._path, _UNKNOWN)
        self._committed = True

    def abort(self) -> None:
        """As the contract says, and also allowed after a commit that went well: then it does nothing."""
        if self._committed:
            return
        try:
            self._call(self._write.abort, "abort", self._path, _NOTHING)
        except StorageError as error:
            logger.warning("%s The temporary of %s stays behind until the next save of that name.", error, self._path)


class _UnwatchedWrite(_WriteInTime):
    def write_at(self, offset: int, data: memoryview) -> None:
        self._write.write_at(offset, data)


class _LockInTime:
    def __init__(self, lock: StorageLock, path: str, call: _Call) -> None:
        self._lock = lock
        self._path = path
        self._call = call

    def release(self) -> None:
        try:
            self._call(self._lock.release, "release the lock", self._path, _UNKNOWN)
        except StorageError as error:
            logger.warning("%s The lock of %s stays until this process ends.", error, self._path)


class _FileInTime:
    def __init__(self, file: StoredFile, call: _Call) -> None:
        self._file = file
        self._call = call
        self.path = file.path
        self.size = file.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._call(lambda: self._file.read_into(offset, target), "read", self.path, _READ_ONLY)

    def expect_other_readers(self) -> None:
        self._file.expect_other_readers()

    def close(self) -> None:
        try:
            self._call(self._file.close, "close", self.path, _READ_ONLY)
        except StorageError as error:
            logger.warning("%s It stays open until then.", error)


class _UnwatchedFile(_FileInTime):
    def read_into(self, offset: int, target: memoryview) -> None:
        self._file.read_into(offset, target)
