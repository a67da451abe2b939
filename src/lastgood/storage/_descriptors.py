"""File descriptors: how many a process may have, and those that several threads use at once."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lastgood.errors import ConfigError
from lastgood.storage.file_ops import FileOps

_OTHERS = 1024


def allow_descriptors(count: int) -> bool:
    """Let this process have ``count`` files open besides the usual; returns whether the system allows so many."""
    count += _OTHERS
    try:
        import resource  # not on every platform that torch is on
    except ImportError:
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= count:
        return True
    allowed = count if hard == unlimited else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    return allowed >= count


class SharedDescriptors:
    """Closes its descriptors when told to, but not before the last thread that uses them is done.

    A descriptor closed under a running call may be another file by the next one: a write after that would land in it.
    """

    def __init__(self, ops: FileOps, path: str, *descriptors: int) -> None:
        self._ops = ops
        self._path = path
        self._descriptors = list(descriptors)
        self._users = 0
        self._lock = threading.Lock()
        self.closed = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the descriptors open for the block; raises :class:`ConfigError` when they have been closed."""
        with self._lock:
            if self.closed:
                raise ConfigError(f"{self._path} is used after it was closed or aborted", path=self._path)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
            self._close_if_unused()

    def add(self, descriptor: int) -> None:
        """Take over one more; call it inside :meth:`in_use`."""
        with self._lock:
            self._descriptors.append(descriptor)

    def close(self) -> None:
        """Let no new user in and close, now or with the last user. Never raises."""
        self.closed = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._lock:
            if not self.closed or self._users:
                return
            descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            # What counts was fsynced or is being thrown away: closing has nothing more to report.
            with contextlib.suppress(OSError):
                self._ops.close(descriptor)
