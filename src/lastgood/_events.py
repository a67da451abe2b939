"""The one source of timings: what happened, to which path, for how long.

Logs, progress lines and metrics subscribe here; the code that does the work only says ``with phase(...)``.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger("lastgood")


@dataclass(frozen=True, slots=True)
class Event:
    """One finished phase of a save or a load.

    ``seconds`` is wall time; ``nbytes`` is how much was moved, where that means something; ``error`` is the
    exception that ended the phase, or ``None``.
    """

    phase: str
    path: str
    rank: int | None
    seconds: float
    nbytes: int | None
    error: BaseException | None


Subscriber = Callable[[Event], None]

_subscribers: list[Subscriber] = []


def subscribe(subscriber: Subscriber) -> Callable[[], None]:
    """Call ``subscriber`` at the end of every phase, in the thread that ran it; returns what undoes this.

    An exception in a subscriber is logged and goes no further: watching a save cannot fail it.
    """
    _subscribers.append(subscriber)

    def unsubscribe() -> None:
        if subscriber in _subscribers:
            _subscribers.remove(subscriber)

    return unsubscribe


@contextmanager
def phase(name: str, path: str, *, rank: int | None = None, nbytes: int | None = None) -> Iterator[None]:
    """Time the block and publish it as one :class:`Event`, whether it succeeds or raises."""
    start = time.perf_counter()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        _publish(Event(name, path, rank, time.perf_counter() - start, nbytes, error))


def _publish(event: Event) -> None:
    if event.error is None:
        logger.debug("%s of %s took %.3f s", event.phase, event.path, event.seconds)
    else:
        logger.debug("%s of %s failed after %.3f s: %r", event.phase, event.path, event.seconds, event.error)
    for subscriber in tuple(_subscribers):
        try:
            subscriber(event)
        except Exception:
            logger.exception(
                "a subscriber to lastgood's events raised; the event was %s of %s", event.phase, event.path
            )
