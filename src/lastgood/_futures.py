"""A future that knows whether anybody has looked at how it failed."""

from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


class ObservedFuture(Future[Result]):
    """A :class:`~concurrent.futures.Future` whose failure must not pass in silence.

    It counts as running from the start, so that nobody can cancel what is under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure_was_fetched = False
        """Whether somebody has got the failure from :meth:`result` or :meth:`exception`."""
        self.set_running_or_notify_cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if error is not None:
            self.failure_was_fetched = True
        return error

    def result(self, timeout: float | None = None) -> Result:
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error
        finally:
            # The traceback refers to this frame, and the frame to the future: let neither keep the other alive.
            del error, self

    def unfetched_failure(self) -> BaseException | None:
        """The failure that nobody has seen yet, if there is one. Asking does not count as seeing it."""
        if not self.done() or self.failure_was_fetched:
            return None
        return super().exception()
