"""Places where a process stops until its test lets it go on, or kills it: the begin and the end of each named phase.

This runs in checkpoint processes too: torch is not imported here.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lastgood import _events

EVERY = "every place"
"""Ordered in place of one place: none to stop at, but news of each."""


def order(file: Path, place: str, times: int = 1) -> None:
    """Have the process that looks into ``file`` stop when it comes to this place so many times from now on."""
    unfinished = file.with_suffix(".new")
    unfinished.write_text(f"{times} {place}")
    unfinished.replace(file)


class Places:
    """Goes by the places of this process, in all its threads, and stops where the file ``orders`` says.

    ``say`` tells the test; ``wait`` returns when the thread that stopped may go on. An order is for the process that
    comes by a place first: one that takes the place of a dead one gets none.
    """

    def __init__(self, orders: str, say: Callable[..., None], wait: Callable[[], None]) -> None:
        self._orders = orders
        self._say = say
        self._wait = wait
        self._wanted = ""
        self._left = 0
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._watch_phases()

    def pass_by(self, place: str) -> None:
        with self._lock:
            self._look_for_order()
            self._passed[place] += 1
            time = self._passed[place]
            self._left -= place == self._wanted
            stops = place == self._wanted and self._left == 0
        if stops:
            self._say("stopped", place)
            self._wait()
        elif self._wanted == EVERY:
            self._say("passed", place, time)

    def _look_for_order(self) -> None:
        with suppress(FileNotFoundError):
            times, _, self._wanted = Path(self._orders).read_text().partition(" ")
            self._left = int(times)
            os.unlink(self._orders)

    def _watch_phases(self) -> None:
        real = _events.phase

        @contextmanager
        def phase(name: str, path: str, **options: Any) -> Iterator[None]:
            self.pass_by(f"begin {name}")
            with real(name, path, **options):
                yield

        _events.phase = phase  # type: ignore[assignment]
        _events.subscribe(lambda event: self.pass_by(f"end {event.phase}"))


def watch_checkpoint_process(pipe: Connection, orders: str) -> None:
    """Runs in a checkpoint process before all else: it says which it is, and goes by its places."""
    pipe.send(("process", os.getpid()))
    lock = threading.Lock()

    def say(*words: Any) -> None:
        with lock, suppress(BrokenPipeError):
            pipe.send(words)

    def wait() -> None:
        with suppress(EOFError, ConnectionResetError):
            pipe.recv()

    Places(orders, say, wait)
