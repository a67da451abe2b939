"""Small trainings for the tests of the demo."""

import os
import select
from collections.abc import Callable
from pathlib import Path

from lastgood.cli._demo.protocol import Event, ModelShape, SaveEvent, Settings, StepDone

TINY = ModelShape(layers=1, width=16, heads=2, context=16)


def tiny_settings(directory: Path, *, steps: int = 8) -> Settings:
    """A training of a second, with a checkpoint after every second step."""
    return Settings(checkpoints=str(directory), steps=steps, save_every=2, seed=11, batch_size=4, model=TINY)


def has_ended(pidfd: int) -> bool:
    """Whether a process has, at this moment; closes the descriptor."""
    ready, _, _ = select.select([pidfd], [], [], 0.0)
    os.close(pidfd)
    return bool(ready)


class Interrupted(BaseException):
    """Stands for the end of the process in tests that stay in one process."""


def interrupt_at(moment: type[StepDone | SaveEvent], step: int, seen: list[Event]) -> Callable[[Event], None]:
    """A report function that keeps what it is told, and ends the training at the given event of the given step."""

    def report(event: Event) -> None:
        seen.append(event)
        if isinstance(event, moment) and event.step == step:
            raise Interrupted

    return report
