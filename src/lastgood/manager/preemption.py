"""Preemption: the operating system's notice that this process is to end soon."""

import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from types import FrameType

from lastgood._events import logger

PREEMPTION_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if name in signal.Signals.__members__
)
"""What schedulers send before they end a job; those of them that this platform has."""


class PreemptionNotice:
    """Notes that one of the signals has come; made and removed in the main thread.

    Whoever handled the signal before is still called. Where that was the operating system, whose way is to end the
    process, the first signal only counts as a notice, and a second one of the same kind ends the process as before.
    Processes forked from this one handle the signals as if this was not here.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.came_at: float | None = None
        """When the first one came, on the clock of ``time.monotonic()``."""
        self.signal_number: int | None = None
        self._owner = os.getpid()
        self._is_removed = False
        self._seen: set[int] = set()
        self._previous: dict[int, object] = {}
        if signals and threading.current_thread() is not threading.main_thread():
            logger.warning(
                "preemption is not noticed: handlers of signals can be set in the main thread only, and this manager "
                "was made in another one"
            )
            return
        for number in dict.fromkeys(signals):
            self._previous[number] = signal.signal(number, self._handle)
        _notices.add(self)

    def remove(self) -> None:
        """Let the previous handlers do it. One that was set since then stays."""
        self._is_removed = True
        if threading.current_thread() is not threading.main_thread():
            return  # what stays installed only passes on
        self._put_back()

    def _put_back(self) -> None:
        for number, previous in reversed(self._previous.items()):
            if signal.getsignal(number) == self._handle and previous is not None:
                signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Nothing here may wait for a lock: the thread it interrupts may hold it.
        counts = os.getpid() == self._owner and not self._is_removed and number not in self._seen
        if counts:
            self._seen.add(number)
            if self.came_at is None:
                self.came_at, self.signal_number = time.monotonic(), number
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        elif previous is signal.SIG_DFL and not counts:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_notices: "weakref.WeakSet[PreemptionNotice]" = weakref.WeakSet()


def _put_all_back() -> None:
    """In a forked process: at once, and not by a handler, which would not run while the process waits for something.

    A data loader ends its workers by SIGTERM, and waits for them.
    """
    # Of several managers' handlers one may lie on top of the other, in whatever order they come here.
    for _ in range(len(_notices)):
        for notice in list(_notices):
            notice._put_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_put_all_back)
