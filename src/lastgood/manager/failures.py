"""What a failed save means for the training: one may be made good by the next, several in a row may not."""

import threading
from typing import Literal

from lastgood._events import logger
from lastgood.errors import ConfigError

OnFailure = Literal["warn", "raise"]

MOST_IN_A_ROW = 3


class Failures:
    """Counts saves that failed. ``"warn"``: they are logged, and raised when three have failed in a row.

    ``"raise"``: each is raised. Either way by the next call that asks, once.
    """

    def __init__(self, on_failure: OnFailure) -> None:
        if on_failure not in ("warn", "raise"):
            raise ConfigError(f'on_failure is {on_failure!r}; it has to be "warn" or "raise"')
        self._tolerated = MOST_IN_A_ROW - 1 if on_failure == "warn" else 0
        self._lock = threading.Lock()
        self._not_raised: list[BaseException] = []
        self.in_a_row = 0
        """How many saves have failed since the last one that did not."""

    def saved(self) -> None:
        """A save is durable: with ``"warn"`` this makes good what failed before it."""
        with self._lock:
            self.in_a_row = 0
            if self._tolerated:
                self._not_raised.clear()

    def failed(self, step: int, error: BaseException) -> int:
        """A save has failed; returns how many have, in a row."""
        with self._lock:
            self.in_a_row += 1
            self._not_raised.append(error)
            count = self.in_a_row
        logger.warning("the save of step %d failed (%d in a row): %s", step, count, error)
        return count

    def raise_if_too_many(self) -> None:
        """Raise the newest failure, once, if more have come than are tolerated."""
        self._raise_newest(self._tolerated)

    def raise_any(self) -> None:
        """Raise the newest failure that nothing has made good, once."""
        self._raise_newest(0)

    def _raise_newest(self, tolerated: int) -> None:
        with self._lock:
            if len(self._not_raised) <= tolerated:
                return
            error = self._not_raised[-1]
            count = len(self._not_raised)
            self._not_raised.clear()
        if count > 1:
            error.add_note(f"{count} saves in a row have failed; this is how the last one did. The log has the others.")
        try:
            raise error
        finally:
            del error
