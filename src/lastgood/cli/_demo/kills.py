"""When to kill: drawn at random beforehand, from a seed, so that a run can be repeated."""

import random
import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Literal, TypeAlias

import msgspec

from lastgood.cli._demo.protocol import Event, SaveBegins, SaveDone, SaveEvent, Staged, StepDone

Moment: TypeAlias = Literal["in a step", "in a save", "staged"]
"""Where a kill falls: while nothing is being saved; between the beginning of a save and its being durable; or, of that
time, in the part when the snapshot is staged already and survives."""

_MOMENTS: tuple[Moment, ...] = ("in a save", "staged", "in a save", "in a step")


class Kill(msgspec.Struct, frozen=True):
    """Kill once ``step`` is over, or during the first save after it.

    The signal is sent when ``fraction`` of the time that a step (or a save, until it is durable) usually takes has
    passed; for ``"staged"``, as soon as the snapshot is.
    """

    step: int
    moment: Moment
    fraction: float


def plan_kills(count: int, *, steps: int, seed: int) -> list[Kill]:
    """``count`` kills, one in each equal part of the run: half of them anywhere in a save, a quarter right after
    staging, and a quarter in a step."""
    draw = random.Random(seed)
    kills = []
    for index in range(count):
        moment = _MOMENTS[index % len(_MOMENTS)]
        first, last = 1 + index * (steps - 1) // count, (index + 1) * (steps - 1) // count
        fraction = draw.uniform(0.05, 0.95)
        if moment != "in a step":
            last = min(last, steps * 9 // 10)  # Leaves other saves to try, should the first be missed.
            fraction **= 2  # Staging is the small first part of a save, and gets its share of the kills.
        step = draw.randint(first, max(first, last))
        kills.append(Kill(step, moment, fraction))
    return kills


class Executioner:
    """Decides, event by event, the moment at which the planned kills fall. The training process is not told."""

    def __init__(self, kills: Sequence[Kill]) -> None:
        self._waiting = deque(kills)
        self._fraction_of_save = 1.0
        self._save_seconds = [0.01]
        self._step_seconds = [0.1]
        self._moment: float | None = None
        self._target: int | None = None  # The step whose save is aimed at.

    @property
    def moment(self) -> float | None:
        """When to send the signal, on the clock of ``time.monotonic()``, unless something happens before."""
        return self._moment

    def watch(self, event: Event) -> None:
        """Take notice of what the training process reports, and move :attr:`moment` accordingly."""
        match event:
            case StepDone():
                self._step_seconds.append(event.seconds)
            case SaveDone():
                self._save_seconds.append(event.seconds)
        if not self._waiting or event_step(event) < self._waiting[0].step:
            return
        kill = self._waiting[0]
        match event:
            case StepDone() if kill.moment == "in a step" and self._moment is None:
                self._moment = time.monotonic() + kill.fraction * median(self._step_seconds)
            case SaveBegins() if kill.moment == "in a save":
                wait = kill.fraction * self._fraction_of_save * median(self._save_seconds)
                self._aim(event.step, wait)
            case Staged() if kill.moment == "staged":
                self._aim(event.step, 0.0)
            case SaveDone() if event.step == self._target:
                # The save was quicker than usual: aim at an earlier moment of the next one.
                self._moment = self._target = None
                self._fraction_of_save /= 2

    def _aim(self, step: int, wait_secs: float) -> None:
        self._moment, self._target = time.monotonic() + wait_secs, step

    def struck(self, moment: Moment) -> None:
        """The signal was sent, and fell on ``moment``. A kill that was meant for a save and came late stays planned."""
        self._moment = self._target = None
        # A moment after staging is one in a save, too.
        if self._waiting[0].moment in ("in a step", moment) or moment == "staged":
            self._waiting.popleft()
            self._fraction_of_save = 1.0


def event_step(event: Event) -> int:
    """The step that an event belongs to; -1 for those that belong to none."""
    return event.step if isinstance(event, StepDone | SaveEvent) else -1
