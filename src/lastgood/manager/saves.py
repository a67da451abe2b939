"""One save from the call to its end: how it gets on, in figures."""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from lastgood import _events
from lastgood.manager.run_log import SaveRecord


class SaveInFlight:
    """A save under way. ``ended`` is called once, by the thread that learns of it, with how it went.

    ``began`` is when it was asked for, on the clock of ``time.perf_counter()``: all times count from there.

    Whoever begins the save calls :meth:`returned` and then :meth:`follow`, or :meth:`end` if it ended at once.
    """

    def __init__(
        self,
        step: int,
        path: str,
        metrics: dict[str, float | None] | None,
        ended: "Callable[[SaveInFlight, BaseException | None], None]",
        *,
        began: float,
    ) -> None:
        self.step = step
        self.path = path
        self.over: Future[None] = Future()
        """Resolves when it is durable, after everybody else has been told; raises what it failed with."""
        self.error: BaseException | None = None
        self._metrics = metrics
        self._ended = ended
        self._time = time.time()
        self._began = began
        self.stall_secs = 0.0
        self._staged_secs: float | None = None
        self._durable_secs: float | None = None
        self._phases: dict[str, float] = {}
        self._nbytes: int | None = None
        self._unsubscribe = _events.subscribe(self._note)

    def returned(self) -> None:
        """The call of ``save`` is over: training goes on."""
        self.stall_secs = time.perf_counter() - self._began

    def follow(self, staged: Future[None], written: Future[None]) -> None:
        """Go on as these futures do."""
        staged.add_done_callback(self._note_staged)
        written.add_done_callback(lambda done: self.end(_failure_of(done)))

    def end(self, error: BaseException | None) -> None:
        """It is over: durable, or failed."""
        self._unsubscribe()
        self.error = error
        seconds = time.perf_counter() - self._began
        if error is None:
            self._durable_secs = seconds
        _events.publish(_events.Event("durable", self.path, None, seconds, self._nbytes, error))
        try:
            self._ended(self, error)
        finally:
            if error is None:
                self.over.set_result(None)
            else:
                self.over.set_exception(error)

    def drop(self) -> None:
        """It never began: the call raises instead."""
        self._unsubscribe()

    def record(self, failures_in_a_row: int) -> SaveRecord:
        """All of it for the log; call it when the save is over."""
        return SaveRecord(
            time=self._time,
            step=self.step,
            outcome="durable" if self.error is None else "failed",
            stall_secs=self.stall_secs,
            staged_secs=self._staged_secs,
            durable_secs=self._durable_secs,
            nbytes=self._nbytes,
            phases=self._phases,
            metrics=self._metrics,
            error=None if self.error is None else f"{type(self.error).__name__}: {self.error}",
            failures_in_a_row=failures_in_a_row,
        )

    def _note_staged(self, done: Future[None]) -> None:
        if _failure_of(done) is None:
            self._staged_secs = time.perf_counter() - self._began
            _events.publish(_events.Event("staged", self.path, None, self._staged_secs, None, None))

    def _note(self, event: _events.Event) -> None:
        if event.phase != "staged" and (event.path == self.path or event.path.startswith(f"{self.path}/")):
            self._phases[event.phase] = self._phases.get(event.phase, 0.0) + event.seconds
            if event.phase == "write":
                self._nbytes = event.nbytes


def _failure_of(done: Future[Any]) -> BaseException | None:
    """Why it failed; with this, its failure counts as fetched."""
    try:
        return done.exception()
    except CancelledError as cancelled:
        return cancelled
