"""Work that follows a save, such as removing old checkpoints: in order, on one thread, while training goes on."""

import queue
import threading
from collections.abc import Callable

from lastgood._events import logger
from lastgood._threads import start_daemon


class Housekeeping:
    """Does one thing after the other in the background; what one of them raises is logged."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._is_idle = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Do it later; or at once, where the interpreter is ending and starts no threads any more."""
        with self._lock:
            if self._thread is None:
                self._thread = start_daemon(self._work, name="lastgood-housekeeping")
            if self._thread is not None:
                self._waiting += 1
                self._jobs.put(job)
                return
        _do(job)

    def wait(self, timeout_secs: float) -> bool:
        """Whether all is done; waits for it."""
        with self._is_idle:
            return self._is_idle.wait_for(lambda: self._waiting == 0, timeout_secs)

    def close(self) -> None:
        """Let the thread end when all is done. Does not wait."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(job)
            del job
            with self._is_idle:
                self._waiting -= 1
                self._is_idle.notify_all()


def _do(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:
        logger.exception("something that follows a save failed; checkpoints are not affected")
