"""Runs a training to its end, killing it on the way and starting it again."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lastgood.cli._demo.kills import Executioner, Kill, Moment
from lastgood.cli._demo.process import TrainingFailedError, TrainingProcess
from lastgood.cli._demo.protocol import Event, Finished, Resumed, SaveBegins, SaveDone, Settings, Staged, StepDone
from lastgood.cli._demo.survivor import Survivor
from lastgood.errors import LastgoodError

_SURVIVOR_SECS = 120.0
"""A checkpoint is written in a fraction of a second; on a busy disk, in some."""


class LostSaveError(LastgoodError):
    """A snapshot that was staged has not become a checkpoint."""


class Killed(msgspec.Struct, frozen=True):
    """A life ended by SIGKILL after ``last_step``."""

    last_step: int
    moment: Moment

    @property
    def in_save(self) -> bool:
        """Whether a save had begun and was not yet known to be durable."""
        return self.moment != "in a step"


class Landed(msgspec.Struct, frozen=True):
    """A checkpoint process has finished the save of ``step`` after its trainer had been killed."""

    step: int


class Life(msgspec.Struct):
    """What one process did, from its start to its end. ``start_seconds`` passed until it had found its place.

    ``landed`` are the steps whose saves its checkpoint process finished after it had been killed.
    """

    events: list[Event] = []
    start_seconds: float = 0.0
    killed: Killed | None = None
    landed: list[int] = []

    @property
    def first_step(self) -> int:
        """The step that it resumed from."""
        return next((event.step for event in self.events if isinstance(event, Resumed)), 0)

    @property
    def last_step(self) -> int:
        """The last step that it did."""
        return max((event.step for event in self.events if isinstance(event, StepDone)), default=self.first_step)

    def steps_of(self, kind: type[SaveBegins | Staged | SaveDone]) -> set[int]:
        """The steps whose saves have come so far."""
        return {event.step for event in self.events if isinstance(event, kind)}

    def unfinished_saves(self) -> set[int]:
        """The steps whose saves have begun, and are not known to be durable."""
        return self.steps_of(SaveBegins) - self.steps_of(SaveDone)

    def moment(self) -> Moment:
        """Where it stands, as far as it has told."""
        unfinished = self.unfinished_saves()
        if unfinished & self.steps_of(Staged):
            return "staged"
        return "in a save" if unfinished else "in a step"


Observer = Callable[[Event | Killed | Landed], None]


def run_to_the_end(settings: Settings, kills: Sequence[Kill], log: Path, observe: Observer) -> list[Life]:
    """Start the training as often as it takes, carrying out the kills; returns its lives, of which the last finished.

    After a kill the next one starts at once, while the checkpoint process of the killed one may still be writing.
    Raises :class:`TrainingFailedError` with the child's traceback when a child ends for any other reason, and
    :class:`LostSaveError` when a checkpoint process does not finish what was staged. Neither a child nor a checkpoint
    process outlives this call, however it ends.
    """
    run = _Run(settings, Executioner(kills), observe)
    try:
        while not run.lives or run.lives[-1].killed:
            with TrainingProcess(settings, log) as process:
                run.live(process)
    finally:
        run.wait_for_survivors()
    run.note_what_has_ended()
    return run.lives


class _Run:
    def __init__(self, settings: Settings, executioner: Executioner, observe: Observer) -> None:
        self.lives: list[Life] = []
        self._checkpoints = Path(settings.checkpoints)
        self._executioner = executioner
        self._observe = observe
        self._survivors: list[tuple[Survivor, Life]] = []

    def live(self, process: TrainingProcess) -> None:
        """Follow one training process to its end, which may be the planned kill."""
        life = Life()
        self.lives.append(life)
        survivor: Survivor | None = None
        started = time.monotonic()
        condemned = False
        while True:
            try:
                event = process.next_event(None if condemned else self._executioner.moment)
            except EOFError:
                break
            if event is None:
                process.kill()
                condemned = True
                if survivor is not None:
                    survivor.trainer_was_killed()
                continue
            life.events.append(event)
            if not process.has_more():
                self.note_what_has_ended()
            if isinstance(event, Resumed):
                life.start_seconds = time.monotonic() - started
                if event.checkpoint_process is not None:
                    survivor = Survivor(event.checkpoint_process, self._checkpoints)
                    self._survivors.append((survivor, life))
            self._observe(event)
            if not condemned:
                self._executioner.watch(event)
        status = process.wait_for_end()
        if condemned and status == -signal.SIGKILL:
            life.killed = Killed(life.last_step, life.moment())
            self._executioner.struck(life.killed.moment)
            self._observe(life.killed)
            self.note_what_has_ended()
        elif status != 0 or not life.events or not isinstance(life.events[-1], Finished):
            raise _failure(process, status)

    def wait_for_survivors(self) -> None:
        """Return when no checkpoint process is left that could write anything."""
        for survivor, _ in self._survivors:
            if not survivor.has_ended(_SURVIVOR_SECS):
                raise TrainingFailedError(
                    f"the checkpoint process {survivor.pid} goes on {_SURVIVOR_SECS:.0f} s after its training process "
                    "has ended; see what it is doing before you remove the checkpoints"
                )

    def note_what_has_ended(self) -> None:
        """See what those checkpoint processes of killed trainers have done that have ended since.

        Call it when all is known that the trainings have told so far: saves that they have begun are theirs.
        """
        for survivor, life in list(self._survivors):
            if life.killed and survivor.has_ended():
                self._survivors.remove((survivor, life))
                self._note_what_it_did(survivor, life)

    def _note_what_it_did(self, survivor: Survivor, life: Life) -> None:
        there, new = survivor.checkpoints()
        life.landed, lost = what_became_of(life, self.lives[self.lives.index(life) + 1 :], there, new)
        for step in life.landed:
            self._observe(Landed(step))
        if lost:
            raise LostSaveError(
                f"the save of step {lost[0]} was staged when its training process was killed, but the checkpoint "
                f"process {survivor.pid} has ended without finishing it; the checkpoints before that are kept"
            )


def what_became_of(life: Life, later: list[Life], there: set[int], new: set[int]) -> tuple[list[int], list[int]]:
    """The steps of a killed life's saves that its checkpoint process finished, and of those staged that are not there.

    ``there`` are the steps whose checkpoints were found when that process had ended, ``new`` those of them that had
    come since the kill. Where a later life has begun to save the same step, nobody can tell whose file it is.
    """
    saves = life.unfinished_saves().difference(*(other.steps_of(SaveBegins) for other in later))
    return sorted(saves & new), sorted((saves & life.steps_of(Staged)) - there)


def _failure(process: TrainingProcess, status: int) -> TrainingFailedError:
    if status < 0:
        how = f"was ended by signal {-status} ({signal.strsignal(-status)}), which the demo did not send"
    else:
        how = f"ended with exit status {status} before its work was done"
    said = process.standard_error() or "It wrote nothing to its standard error."
    return TrainingFailedError(f"the training process {process.pid} {how}. Its checkpoints are kept.\n\n{said}")
