"""One training process: started, listened to, and ended for good whatever happens to the demo."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec

from lastgood.cli._demo.protocol import Event, Settings, decode
from lastgood.errors import LastgoodError

_SILENCE_LIMIT_SECS = 300.0
"""A step takes a fraction of a second; importing torch on a busy machine, some ten."""


class TrainingFailedError(LastgoodError):
    """The training process ended by itself before its work was done, or went silent."""


class TrainingProcess:
    """A child that trains. Its standard error is added to the file ``log``.

    It has a session of its own, so that Ctrl-C reaches the demo alone: leaving the ``with`` block ends the child.
    """

    def __init__(self, settings: Settings, log: Path) -> None:
        self._log = log
        self._unread = b""
        with log.open("ab") as standard_error:
            self._log_start = standard_error.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lastgood.cli._demo.training", msgspec.json.encode(settings).decode()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=standard_error,
                start_new_session=True,
            )
        assert self._process.stdout is not None  # Popen was told to make a pipe.
        self._pipe = self._process.stdout

    def __enter__(self) -> "TrainingProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def next_event(self, until: float | None = None) -> Event | None:
        """The next thing that the child reports, or ``None`` if it reports nothing before ``until``.

        ``until`` is on the clock of ``time.monotonic()``. Raises ``EOFError`` when the child has ended.
        """
        silent_until = time.monotonic() + _SILENCE_LIMIT_SECS
        deadline = silent_until if until is None else min(until, silent_until)
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                if deadline == silent_until:
                    raise TrainingFailedError(
                        f"the training process {self.pid} has reported nothing for {_SILENCE_LIMIT_SECS:.0f} s "
                        "and is now killed; its checkpoints are kept"
                    )
                return None
            piece = os.read(self._pipe.fileno(), 65536)
            if not piece:
                raise EOFError
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return decode(line)

    def has_more(self) -> bool:
        """Whether :meth:`next_event` would not wait."""
        return b"\n" in self._unread or bool(select.select([self._pipe], [], [], 0.0)[0])

    @property
    def pid(self) -> int:
        """The number of the child, which is its until :meth:`wait_for_end` or the end of the ``with`` block."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: the child gets no chance to tidy up. What it reported before can still be read."""
        self._process.kill()

    def wait_for_end(self) -> int:
        """The exit status, once there are no more events; minus the number of the signal that ended it."""
        return self._process.wait()

    def standard_error(self) -> str:
        """What this child, not an earlier one, wrote to its standard error."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace").strip()
