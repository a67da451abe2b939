"""A line that shows how far a long save or load has come; only in a terminal, and only once it has become long."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lastgood import _events

_LONG_SECS = 1.0


@contextmanager
def shown_progress(what: str) -> Iterator[None]:
    """Show the bytes that are read and written while the block runs, on the standard error stream."""
    if not sys.stderr.isatty():
        yield
        return
    with ExitStack() as shown:
        line = _Line(what, shown)
        shown.callback(_events.subscribe_to_progress(line.update))
        yield


class _Line:
    def __init__(self, what: str, shown: ExitStack) -> None:
        self._what = what
        self._shown = shown
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._task: Any = None

    def update(self, progress: _events.Progress) -> None:
        with self._lock:
            if self._bar is None:
                if time.monotonic() - self._began < _LONG_SECS:
                    return
                self._bar = self._shown.enter_context(_make_bar())
                self._task = self._bar.add_task(self._what, total=progress.total)
            self._bar.update(self._task, total=progress.total, completed=progress.done)


def _make_bar() -> Any:
    # Imported when there is something to show: a training has other things to do at its start.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
