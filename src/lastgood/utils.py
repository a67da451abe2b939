"""Small helpers that need nothing but the standard library."""

from concurrent.futures import CancelledError, Future
from typing import Any


def wrap_future(result: Any) -> Future[None]:
    """A future that says only whether ``result`` went well.

    Given a future: resolves to ``None`` once that one succeeds, and raises what that one raised, whatever kind of
    exception it is; if that one was cancelled, ``CancelledError``. It only watches: it cannot be cancelled
    itself, and it does not keep the other one's result alive. Given anything else: resolved already.
    """
    wrapped: Future[None] = Future()
    # A running future refuses to be cancelled: otherwise the outcome would find its place taken and be lost.
    wrapped.set_running_or_notify_cancel()
    if not isinstance(result, Future):
        wrapped.set_result(None)
        return wrapped

    def pass_on(done: Future[Any]) -> None:
        try:
            error = done.exception()
        except CancelledError as cancelled:
            error = cancelled
        if error is None:
            wrapped.set_result(None)
        else:
            wrapped.set_exception(error)

    result.add_done_callback(pass_on)
    return wrapped
