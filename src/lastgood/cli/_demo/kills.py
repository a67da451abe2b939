"""When to kill: drawn at random beforehand, from a seed, so that a run can be repeated."""

import random
import time
from collections import deque
from collections.abc import Sequence
from statistics import median

import msgspec

from lastgood.cli._demo.protocol import Event, SaveBegins, SaveDone, StepDone


class Kill(msgspec.Struct, frozen=True):
    """Kill once ``step`` is over, or during the first save after it.

    The signal is sent when ``fraction`` of the time that a step (or a save) usually takes has passed.
    """

    step: int
    in_save: bool
    fraction: float


def plan_kills(count: int, *, steps: int, seed: int) -> list[Kill]:
    """``count`` kills at random moments, one in each equal part of the run; every second of them during a save."""
    draw = random.Random(seed)
    kills = []
    for index in range(count):
        in_save = index % 2 == 0
        first, last = 1 + index * (steps - 1) // count, (index + 1) * (steps - 1) // count
        if in_save:
            last = min(last, steps * 9 // 10)  # Leaves other saves to try, should the first be missed.
        step = draw.randint(first, max(first, last))
        kills.append(Kill(step, in_save=in_save, fraction=draw.uniform(0.05, 0.95)))
    return kills


class Executioner:
    """Decides, event by event, the moment at which the planned kills fall. The training process is not told."""

    def __init__(self, kills: Sequence[Kill]) -> None:
        self._waiting = deque(kills)
        self._fraction_of_save = 1.0
        self._save_seconds = [0.01]
        self._step_seconds = [0.1]
        self._moment: float | None = None

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
            case StepDone() if not kill.in_save and self._moment is None:
                self._moment = time.monotonic() + kill.fraction * median(self._step_seconds)
            case SaveBegins() if kill.in_save:
                wait = kill.fraction * self._fraction_of_save * median(self._save_seconds)
                self._moment = time.monotonic() + wait
            case SaveDone() if kill.in_save:
                # The save was quicker than usual: aim at an earlier moment of the next one.
                self._moment = None
                self._fraction_of_save /= 2

    def struck(self, *, in_save: bool) -> None:
        """The signal was sent. A kill that was meant for a save and came a little late stays planned."""
        self._moment = None
        if in_save or not self._waiting[0].in_save:
            self._waiting.popleft()
            self._fraction_of_save = 1.0


def event_step(event: Event) -> int:
    """The step that an event belongs to; -1 for those that belong to none."""
    return event.step if isinstance(event, StepDone | SaveBegins | SaveDone) else -1
