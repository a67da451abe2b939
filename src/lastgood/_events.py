"""The one source of timings: what happened, to which path, for how long.

Logs, progress lines and metrics subscribe here; the code that does the work only says ``with phase(...)``.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase has come: ``done`` of ``total`` bytes."""

    phase: str
    path: str
    done: int
    total: int


Subscriber = Callable[[Event], None]
ProgressSubscriber = Callable[[Progress], None]

_subscribers: list[Subscriber] = []
_progress_subscribers: list[ProgressSubscriber] = []


def subscribe(subscriber: Subscriber) -> Callable[[], None]:
    """Call ``subscriber`` at the end of every phase, in the thread that ran it; returns what undoes this.

    An exception in a subscriber is logged and goes no further: watching a save cannot fail it.
    """
    return _add(_subscribers, subscriber)


def subscribe_to_progress(subscriber: ProgressSubscriber) -> Callable[[], None]:
    """Call ``subscriber`` each time that some MiB have been read or written; returns what undoes this."""
    return _add(_progress_subscribers, subscriber)


def _add(subscribers: list[Any], subscriber: Any) -> Callable[[], None]:
    subscribers.append(subscriber)

    def unsubscribe() -> None:
        if subscriber in subscribers:
            subscribers.remove(subscriber)

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
        publish(Event(name, path, rank, time.perf_counter() - start, nbytes, error))


def publish(event: Event) -> None:
    """Tell all subscribers of a phase that has ended somewhere else, or that is no block of code."""
    if event.error is None:
        logger.debug("%s of %s took %.3f s", event.phase, event.path, event.seconds)
    else:
        logger.debug("%s of %s failed after %.3f s: %r", event.phase, event.path, event.seconds, event.error)
    _tell(_subscribers, event)


class ByteMeter:
    """Counts the bytes of a phase as they are moved, by several threads, and tells the subscribers to progress."""

    def __init__(self, phase: str, path: str, total: int) -> None:
        self._phase = phase
        self._path = path
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more have been moved."""
        with self._lock:
            self._done += count
            done = self._done
        if _progress_subscribers:
            publish_progress(Progress(self._phase, self._path, done, self._total))


def publish_progress(progress: Progress) -> None:
    """Tell all subscribers to progress."""
    _tell(_progress_subscribers, progress)


def _tell(subscribers: list[Any], news: Event | Progress) -> None:
    for subscriber in tuple(subscribers):
        try:
            subscriber(news)
        except Exception:
            logger.exception("a subscriber to lastgood's events raised; the event was %s of %s", news.phase, news.path)
