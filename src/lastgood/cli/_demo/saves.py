"""Saving in the background, and telling how each save gets on."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lastgood import AsyncCheckpointer, _events
from lastgood.cli._demo.directories import directory_of, remove_old, size_of
from lastgood.cli._demo.protocol import Event, SaveBegins, SaveDone, SaveReturned, Staged


class Saves:
    """Begins saves and reports how they get on, the moment they do: ``report`` is called by several threads.

    Once a checkpoint is durable, and not before, old ones are removed: the newest ``keep`` stay.
    """

    def __init__(
        self, checkpointer: AsyncCheckpointer, directory: Path, *, keep: int, report: Callable[[Event], None]
    ) -> None:
        self._checkpointer = checkpointer
        self._directory = directory
        self._keep = keep
        self._report = report
        self._under_way: deque[Future[None]] = deque()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Save the state as it is now; the training may go on when this returns."""
        self._report(SaveBegins(step))
        path = directory_of(step, self._directory)
        began = time.perf_counter()

        def staged() -> None:
            self._report(Staged(step, time.perf_counter() - began))

        def durable() -> None:
            self._report(SaveDone(step, time.perf_counter() - began, size_of(path)))
            remove_old(self._directory, self._keep)

        stage_future, write_future = self._checkpointer.save(str(path), state)
        self._report(SaveReturned(step, time.perf_counter() - began))
        self._under_way += [_then(stage_future, staged), _then(write_future, durable)]

    def look(self) -> None:
        """Raise what went wrong with a save that is over. Does not wait for those that are not."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()

    def finish(self) -> None:
        """Wait for all, and raise what went wrong. Close the checkpointer first: it bounds the wait."""
        while self._under_way:
            self._under_way.popleft().result()


def _then(future: Future[None], do: Callable[[], None]) -> Future[None]:
    """Call ``do`` once ``future`` has gone well, in the thread that made it so; a future of both."""
    both: Future[None] = Future()

    def go_on(done: Future[None]) -> None:
        try:
            done.result()
            do()
        except BaseException as error:
            both.set_exception(error)
        else:
            both.set_result(None)

    future.add_done_callback(go_on)
    return both


@contextmanager
def held_back() -> Iterator[list[float]]:
    """How many seconds each optimizer step in the block had to wait until a snapshot was staged."""
    seconds: list[float] = []

    def note(event: _events.Event) -> None:
        if event.phase == "hold":
            seconds.append(event.seconds)

    unsubscribe = _events.subscribe(note)
    try:
        yield seconds
    finally:
        unsubscribe()
