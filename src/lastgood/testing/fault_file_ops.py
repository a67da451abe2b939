"""File operations that go wrong when they are told to: errors, short transfers, calls that do not come back.

For those who write storage backends on files, or code above them::

    ops = FaultFileOps()
    ops.fail("fsync", errno.EIO, call=2)
    with pytest.raises(StorageError):
        LocalStorage(ops).put(path, data)
    assert ops.faults == 1
"""

import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lastgood.storage._direct_io import ALIGNMENT, round_down
from lastgood.storage.file_ops import FileOps, FileStatus, OsFileOps

Result = TypeVar("Result")

OPERATIONS = tuple(name for name in vars(FileOps) if not name.startswith("_"))
"""The names of all operations of :class:`~lastgood.storage.file_ops.FileOps`."""

TRANSFERS = ("pwrite", "pread_into")
"""Those of them that may move fewer bytes than they were asked to."""


class Stall:
    """Calls that do not come back until :meth:`release`; made by :meth:`FaultFileOps.stall`."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        """The threads that have made these calls."""
        self._reached = threading.Event()
        self._over = threading.Event()

    @property
    def is_reached(self) -> bool:
        """Whether such a call has been made."""
        return self._reached.is_set()

    def wait_until_reached(self, timeout_secs: float) -> bool:
        """Wait for such a call to be made; whether one was within that time."""
        return self._reached.wait(timeout_secs)

    def release(self) -> None:
        """Let them go on: what they were to do is done now, as by storage that was very slow. May be called again."""
        self._over.set()

    def _hold(self) -> None:
        self.threads.append(threading.current_thread())
        self._reached.set()
        self._over.wait()


@dataclass(frozen=True)
class _Fault:
    """What happens to some calls of an operation (``None``: of all): one of error, stall, and a shorter transfer."""

    operation: str | None
    first: int
    last: float
    error: int | None = None
    is_done: bool = False
    stall: Stall | None = None
    longest: int | None = None


class FaultFileOps:
    """:class:`~lastgood.storage.file_ops.FileOps` that counts its calls, and lets those fail that it is told to.

    What is not told to fail is passed on to ``real`` (by default the machine's own file systems). An ``operation`` is a
    name in :data:`OPERATIONS`, or ``None`` for whichever is called. ``call`` is the number of a call of it, from 1,
    counted since this object was made; with ``lasting``, the calls after that one are meant, too. Of several faults for
    one call, that which was asked for last counts. All methods may be called from several threads.
    """

    def __init__(self, real: FileOps | None = None) -> None:
        self._real: FileOps = OsFileOps() if real is None else real
        self._lock = threading.Lock()
        self._calls: list[str] = []
        self._counts: Counter[str] = Counter()
        self._faults: list[_Fault] = []
        self._direct: set[int] = set()
        self.faults = 0
        """How many calls have met a fault so far."""

    # What to do wrong

    @property
    def calls(self) -> list[str]:
        """The names of the operations that have been called, in the order in which the calls began."""
        with self._lock:
            return list(self._calls)

    def count(self, operation: str | None = None) -> int:
        """How often it has been called."""
        with self._lock:
            return len(self._calls) if operation is None else self._counts[operation]

    def fail(
        self, operation: str | None, error: int, *, call: int = 1, lasting: bool = False, is_done: bool = False
    ) -> None:
        """Raise an ``OSError`` with the errno ``error`` in place of doing it.

        With ``is_done``, it is done all the same, as when the answer of a file server is lost. ``close`` always is:
        the descriptor is gone even when the operating system reports an error.
        """
        self._add(_Fault(operation, call, _last(call, lasting), error=error, is_done=is_done))

    def shorten(self, operation: str, *, call: int = 1, lasting: bool = False, longest: int | None = None) -> None:
        """Move at most ``longest`` bytes (``None``: half of them), and say so; one of :data:`TRANSFERS`.

        Never less than one byte. Past the page cache it is whole blocks, at least one, as the operating system has it.
        """
        if operation not in TRANSFERS:
            raise ValueError(f"{operation!r} moves no bytes; those that do are {', '.join(TRANSFERS)}")
        self._add(_Fault(operation, call, _last(call, lasting), longest=0 if longest is None else max(1, longest)))

    def stall(self, operation: str | None, *, call: int = 1, lasting: bool = False) -> Stall:
        """Do not come back before the stall is released, and do it then."""
        stall = Stall()
        self._add(_Fault(operation, call, _last(call, lasting), stall=stall))
        return stall

    def heal(self) -> None:
        """From now on everything is well, and calls that were stalled go on. Counting does not begin anew."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            if fault.stall is not None:
                fault.stall.release()

    def _add(self, fault: _Fault) -> None:
        if fault.operation is not None and fault.operation not in OPERATIONS:
            raise ValueError(f"there is no operation {fault.operation!r}; there are {', '.join(OPERATIONS)}")
        if fault.first < 1:
            raise ValueError(f"calls are counted from 1: there is none with the number {fault.first}")
        with self._lock:
            self._faults.append(fault)

    def _take(self, operation: str) -> _Fault | None:
        """Count a call, and find what is to happen to it."""
        with self._lock:
            self._calls.append(operation)
            self._counts[operation] += 1
            for fault in reversed(self._faults):
                count = len(self._calls) if fault.operation is None else self._counts[operation]
                if fault.operation in (None, operation) and fault.first <= count <= fault.last:
                    self.faults += 1
                    return fault
        return None

    def _do(self, operation: str, act: Callable[[], Result], path: str | None = None) -> Result:
        return self._meet(self._take(operation), act, path, is_always_done=operation == "close")

    def _meet(
        self, fault: _Fault | None, act: Callable[[], Result], path: str | None = None, *, is_always_done: bool = False
    ) -> Result:
        if fault is None:
            return act()
        if fault.stall is not None:
            fault.stall._hold()
        if fault.error is None:
            return act()
        if fault.is_done or is_always_done:
            act()
        raise OSError(fault.error, os.strerror(fault.error), path)

    def _shortened(self, fault: _Fault | None, descriptor: int, data: memoryview) -> memoryview:
        if fault is None or fault.longest is None:
            return data
        longest = fault.longest or max(1, len(data) // 2)
        with self._lock:
            is_direct = descriptor in self._direct
        return data[: max(ALIGNMENT, round_down(longest)) if is_direct else longest]

    def _opened(self, descriptor: int, *, direct: bool = False) -> int:
        with self._lock:
            (self._direct.add if direct else self._direct.discard)(descriptor)
        return descriptor

    # The operations

    def open_exclusive(self, path: str) -> int:
        return self._opened(self._do("open_exclusive", lambda: self._real.open_exclusive(path), path))

    def open_direct(self, path: str, write: bool) -> int:
        return self._opened(self._do("open_direct", lambda: self._real.open_direct(path, write), path), direct=True)

    def open_read(self, path: str) -> int:
        return self._opened(self._do("open_read", lambda: self._real.open_read(path), path))

    def open_write(self, path: str) -> int:
        return self._opened(self._do("open_write", lambda: self._real.open_write(path), path))

    def open_append(self, path: str) -> int:
        return self._opened(self._do("open_append", lambda: self._real.open_append(path), path))

    def close(self, descriptor: int) -> None:
        self._do("close", lambda: self._real.close(descriptor))

    def reserve(self, descriptor: int, size: int) -> None:
        self._do("reserve", lambda: self._real.reserve(descriptor, size))

    def truncate(self, descriptor: int, size: int) -> None:
        self._do("truncate", lambda: self._real.truncate(descriptor, size))

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        fault = self._take("pwrite")
        part = self._shortened(fault, descriptor, data)
        return self._meet(fault, lambda: self._real.pwrite(descriptor, part, offset))

    def pread_into(self, descriptor: int, target: memoryview, offset: int) -> int:
        fault = self._take("pread_into")
        part = self._shortened(fault, descriptor, target)
        return self._meet(fault, lambda: self._real.pread_into(descriptor, part, offset))

    def cached_bytes(self, descriptor: int, offset: int, length: int) -> int:
        return self._do("cached_bytes", lambda: self._real.cached_bytes(descriptor, offset, length))

    def fsync(self, descriptor: int) -> None:
        self._do("fsync", lambda: self._real.fsync(descriptor))

    def fsync_directory(self, path: str) -> None:
        self._do("fsync_directory", lambda: self._real.fsync_directory(path), path)

    def link(self, existing: str, new: str) -> None:
        self._do("link", lambda: self._real.link(existing, new), new)

    def replace(self, source: str, target: str) -> None:
        self._do("replace", lambda: self._real.replace(source, target), target)

    def rename_without_replacing(self, source: str, target: str) -> None:
        self._do("rename_without_replacing", lambda: self._real.rename_without_replacing(source, target), target)

    def unlink(self, path: str) -> None:
        self._do("unlink", lambda: self._real.unlink(path), path)

    def make_directory(self, path: str) -> None:
        self._do("make_directory", lambda: self._real.make_directory(path), path)

    def remove_directory(self, path: str) -> None:
        self._do("remove_directory", lambda: self._real.remove_directory(path), path)

    def list_directory(self, path: str) -> list[str]:
        return self._do("list_directory", lambda: self._real.list_directory(path), path)

    def status(self, target: str | int) -> FileStatus:
        path = target if isinstance(target, str) else None
        return self._do("status", lambda: self._real.status(target), path)

    def available_bytes(self, path: str) -> int | None:
        return self._do("available_bytes", lambda: self._real.available_bytes(path), path)

    def lock(self, descriptor: int) -> bool:
        return self._do("lock", lambda: self._real.lock(descriptor))

    def lock_shared(self, descriptor: int) -> bool:
        return self._do("lock_shared", lambda: self._real.lock_shared(descriptor))


def _last(first: int, lasting: bool) -> float:
    return math.inf if lasting else first
