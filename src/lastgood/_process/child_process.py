"""One child process that runs a module of Python: started, watched, and ended for good.

It has a session of its own, so that signals to the parent's terminal or process group do not reach it, and it does
not depend on the thread that started it.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

_LARGEST_OUTPUT = 1 << 20
_READ_AT_ONCE = 64 << 10
_REAP_SECS = 5.0


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; ``None`` where there are none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel, or a container that forbids it
        return None


class ChildOutput:
    """What a child writes to its standard streams: kept in memory, under no name, however the child ends."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("lastgood-output")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        # All who write append, so that cutting the file back leaves no hole.
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
        self._lock = threading.Lock()
        self._position = 0
        self._tail = b""
        self._unfinished = b""

    def read_lines(self, *, all_of_it: bool = False) -> str:
        """The whole lines that came since the last call; of very much, the end."""
        with self._lock:
            lines, end, rest = (self._unfinished + self._read_new()).rpartition(b"\n")
            if all_of_it:
                lines, rest = lines + end + rest, b""
            self._unfinished = rest
        return lines.decode(errors="replace").rstrip()

    def _read_new(self) -> bytes:
        if self.descriptor < 0:
            return b""
        size = os.fstat(self.descriptor).st_size
        self._position = max(self._position, size - _READ_AT_ONCE)
        new = os.pread(self.descriptor, size - self._position, self._position)
        self._position += len(new)
        if self._position > _LARGEST_OUTPUT:
            os.ftruncate(self.descriptor, 0)
            self._position = 0
        self._tail = (self._tail + new)[-_READ_AT_ONCE:]
        return new

    def last_lines(self, count: int = 20) -> str:
        """The last lines of what has been read."""
        with self._lock:
            return "\n".join(self._tail.decode(errors="replace").strip().splitlines()[-count:])

    def close(self) -> None:
        with self._lock:
            descriptor, self.descriptor = self.descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)


class ChildProcess:
    """A child that runs ``python -m module``, from its start until it has been waited for.

    It gets the descriptors in ``pass_fds`` under their numbers, nothing on standard input, and ``output`` as its other
    standard streams. The signals ``held_back`` do not reach it before it lets them through (``pthread_sigmask``). All
    methods may be called by any thread; in a forked copy of the parent they do nothing.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        output: int = subprocess.DEVNULL,
        held_back: Sequence[signal.Signals] = (),
    ) -> None:
        self._parent = os.getpid()
        self._lock = threading.Lock()
        # -P: what lies in the working directory must not stand in for a module.
        with _signals_held_back(held_back):
            self._popen = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                env=environment,
                start_new_session=True,
            )
        self.pid: int = self._popen.pid
        # Its number cannot be given to another process before it has been waited for, which only this class does.
        self._pidfd = open_pidfd(self.pid)

    @property
    def end_descriptor(self) -> int | None:
        """Readable once the child has ended, until :meth:`close`; ``None`` where there are no such descriptors."""
        return self._pidfd

    def is_alive(self) -> bool:
        if os.getpid() != self._parent:
            return self._popen.returncode is None
        return self._popen.poll() is None

    def wait(self, timeout_secs: float) -> bool:
        """Wait for the end of the child; whether it has come."""
        if not self.is_alive():
            return True
        with self._lock:
            pidfd = None if self._pidfd is None else os.dup(self._pidfd)
        if pidfd is not None:
            try:
                if not _wait_readable(pidfd, timeout_secs):
                    return False
            finally:
                os.close(pidfd)
            timeout_secs = (
                _REAP_SECS  # It has ended: what is left is to collect its status, unless another thread does.
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_secs)
        return not self.is_alive()

    def kill(self) -> None:
        """SIGKILL, if it is still alive. :meth:`wait` says when that has worked."""
        if os.getpid() != self._parent:
            return
        with self._lock:
            if self._pidfd is None:
                self._popen.kill()
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self, timeout_secs: float = _REAP_SECS) -> bool:
        """Kill it and wait until it is gone; ``False`` if it still is not (stuck in the operating system)."""
        self.kill()
        return self.wait(timeout_secs)

    def how_it_ended(self) -> str:
        """In words that can follow its name."""
        status = self._popen.returncode if not self.is_alive() else None
        if status is None:
            return "is still running"
        if status >= 0:
            return f"exited with status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        hint = " (which is also what the kernel sends when memory runs out)" if -status == signal.SIGKILL else ""
        return f"was killed by signal {-status}, {name}{hint}"

    def close(self) -> None:
        """Release what was needed to watch it; it goes on if it is still alive."""
        with self._lock:
            pidfd, self._pidfd = self._pidfd, None
            if pidfd is not None:
                os.close(pidfd)


@contextlib.contextmanager
def _signals_held_back(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """For this thread and what it starts meanwhile: a child begins with the mask of the thread that started it."""
    if not signals or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProcessHandle:
    """What users see of the process: the same names as for processes that torch starts."""

    def __init__(self, child: ChildProcess) -> None:
        self.processes = [child]

    def join(self, timeout: float | None = None) -> bool:
        """Wait for its end; whether it has come. Users may replace this."""
        return self.processes[0].wait(365 * 86400.0 if timeout is None else timeout)


def _wait_readable(descriptor: int, timeout_secs: float) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + timeout_secs
    while True:
        # In a C int of milliseconds: very long waits are several.
        left = max(0.0, deadline - time.monotonic())
        if poller.poll(min(left * 1000 + 1, 3_600_000)):
            return True
        if time.monotonic() >= deadline:
            return False
