"""This process and all that it has started, together: their memory, their processor time, and whether they are gone."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_SECONDS_TO_LEAVE = 10.0


def descendants() -> set[int]:
    """The processes below this one, but for Python's own helper that lives as long as this process does."""
    parents = _parents()
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        below = [pid for pid in children.get(waiting.pop(), ()) if not _is_resource_tracker(pid)]
        found.update(below)
        waiting += below
    return found


def memory_bytes() -> int:
    """The memory of the tree. What several processes have mapped counts once: each has its share (PSS).

    Shares move from one process to another while they are being read; what would count twice by that is left out.
    """
    before = _pss_bytes(os.getpid())
    below = sum(map(_pss_bytes, descendants()))
    return min(before, _pss_bytes(os.getpid())) + below


def cpu_seconds() -> float:
    """User and system time of the tree, with that of children that have gone."""
    return sum(_cpu_seconds(pid) for pid in {os.getpid(), *descendants()})


def remaining(pids: set[int]) -> set[int]:
    """Those that do not leave within a few seconds."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    while (left := _running(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def kill(pids: set[int]) -> None:
    """End these processes, which this one has started."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Peak:
    """The most memory that the tree has had since then, sampled at a fixed rate by a thread."""

    def __init__(self, interval: float = 0.02) -> None:
        self.nbytes = 0
        self.samples = 0
        self._interval = interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, memory_bytes())
            self.samples += 1
            if self._over.wait(self._interval):
                return


def _running(pids: set[int]) -> set[int]:
    return {pid for pid in pids if (fields := _stat_fields(pid)) and fields[0] != "Z"}


def _parents() -> dict[int, int]:
    return {pid: int(fields[1]) for pid in _pids() if (fields := _stat_fields(pid))}


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _stat_fields(pid: int) -> list[str]:
    """Those after the name: state, parent ...; nothing if the process has gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cpu_seconds(pid: int) -> float:
    fields = _stat_fields(pid)
    return sum(map(int, fields[11:15])) / _TICKS_A_SECOND if fields else 0.0


def _pss_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name == "Pss":
                    return int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def _is_resource_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
