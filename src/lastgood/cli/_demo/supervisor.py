"""Runs a training to its end, killing it on the way and starting it again."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lastgood.cli._demo.kills import Executioner, Kill
from lastgood.cli._demo.process import TrainingFailedError, TrainingProcess
from lastgood.cli._demo.protocol import Event, Finished, Resumed, SaveBegins, SaveDone, Settings, StepDone


class Killed(msgspec.Struct, frozen=True):
    """A life ended by SIGKILL after ``last_step``, and, if ``in_save``, before a save that had begun was over."""

    last_step: int
    in_save: bool


class Life(msgspec.Struct):
    """What one process did, from its start to its end. ``start_seconds`` passed until it had found its place."""

    events: list[Event] = []
    start_seconds: float = 0.0
    killed: Killed | None = None

    @property
    def first_step(self) -> int:
        """The step that it resumed from."""
        return next((event.step for event in self.events if isinstance(event, Resumed)), 0)

    @property
    def last_step(self) -> int:
        """The last step that it did."""
        return max((event.step for event in self.events if isinstance(event, StepDone)), default=self.first_step)

    def is_saving(self) -> bool:
        """Whether the last save to begin is not over."""
        saves = [event for event in self.events if isinstance(event, SaveBegins | SaveDone)]
        return bool(saves) and isinstance(saves[-1], SaveBegins)


Observer = Callable[[Event | Killed], None]


def run_to_the_end(settings: Settings, kills: Sequence[Kill], log: Path, observe: Observer) -> list[Life]:
    """Start the training as often as it takes, carrying out the kills; returns its lives, of which the last finished.

    Raises :class:`TrainingFailedError` with the child's traceback when a child ends for any other reason.
    No child outlives this call, however it ends.
    """
    executioner = Executioner(kills)
    lives: list[Life] = []
    while not lives or lives[-1].killed:
        with TrainingProcess(settings, log) as process:
            lives.append(_live(process, executioner, observe))
    return lives


def _live(process: TrainingProcess, executioner: Executioner, observe: Observer) -> Life:
    life = Life()
    started = time.monotonic()
    condemned = False
    while True:
        try:
            event = process.next_event(None if condemned else executioner.moment)
        except EOFError:
            break
        if event is None:
            process.kill()
            condemned = True
            continue
        life.events.append(event)
        observe(event)
        if isinstance(event, Resumed):
            life.start_seconds = time.monotonic() - started
        if not condemned:
            executioner.watch(event)
    status = process.wait_for_end()
    if condemned and status == -signal.SIGKILL:
        life.killed = Killed(life.last_step, life.is_saving())
        executioner.struck(in_save=life.killed.in_save)
        observe(life.killed)
    elif status != 0 or not life.events or not isinstance(life.events[-1], Finished):
        raise _failure(process, status)
    return life


def _failure(process: TrainingProcess, status: int) -> TrainingFailedError:
    if status < 0:
        how = f"was ended by signal {-status} ({signal.strsignal(-status)}), which the demo did not send"
    else:
        how = f"ended with exit status {status} before its work was done"
    said = process.standard_error() or "It wrote nothing to its standard error."
    return TrainingFailedError(f"the training process {process.pid} {how}. Its checkpoints are kept.\n\n{said}")
