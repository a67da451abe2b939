"""What the lives of a run add up to, and what two runs have in common."""

from itertools import pairwise
from statistics import median

import msgspec

from lastgood.cli._demo.protocol import Resumed, SaveDone, StepDone
from lastgood.cli._demo.supervisor import Life


class Figures(msgspec.Struct, frozen=True):
    """One run in numbers; a median or maximum of nothing is 0."""

    kills: int
    kills_in_save: int
    steps: int
    steps_repeated: int
    passed_over: int
    checkpoints: int
    checkpoint_bytes: int
    stall_median_seconds: float
    stall_max_seconds: float
    stall_share: float
    load_median_seconds: float
    restart_median_seconds: float


class Part(msgspec.Struct, frozen=True):
    """One part of the state, and its SHA-256 in either run."""

    name: str
    reference: str
    killed: str


class Comparison(msgspec.Struct, frozen=True):
    """What two final states have in common. ``different`` lists the dotted paths at which they are not the same."""

    parts: tuple[Part, ...]
    different: tuple[str, ...]
    files_hold_what_was_in_memory: bool

    @property
    def identical(self) -> bool:
        """Whether every bit is the same, and each file holds what its training process had in memory."""
        return not self.different and self.files_hold_what_was_in_memory


def figures_of(lives: list[Life]) -> Figures:
    """Count kills, repeated steps, saves and restarts of a run, in the order in which its processes lived."""
    kills = [life.killed for life in lives if life.killed]
    saves = [event for life in lives for event in life.events if isinstance(event, SaveDone)]
    steps = [event for life in lives for event in life.events if isinstance(event, StepDone)]
    resumed = [event for life in lives[1:] for event in life.events if isinstance(event, Resumed)]
    stalled = sum(save.seconds for save in saves)
    trained = sum(step.seconds for step in steps)
    return Figures(
        kills=len(kills),
        kills_in_save=sum(kill.in_save for kill in kills),
        steps=max((step.step for step in steps), default=0),
        steps_repeated=sum(repeated_steps(lives)),
        passed_over=sum(len(event.passed_over) for event in resumed),
        checkpoints=len(saves),
        checkpoint_bytes=saves[-1].nbytes if saves else 0,
        stall_median_seconds=_median([save.seconds for save in saves]),
        stall_max_seconds=max((save.seconds for save in saves), default=0.0),
        stall_share=stalled / (stalled + trained) if saves else 0.0,
        load_median_seconds=_median([event.seconds for event in resumed]),
        restart_median_seconds=_median([life.start_seconds for life in lives[1:]]),
    )


def repeated_steps(lives: list[Life]) -> list[int]:
    """For each restart, how many steps had been done since the checkpoint that it resumed from."""
    return [before.last_step - after.first_step for before, after in pairwise(lives)]


def _median(values: list[float]) -> float:
    return median(values) if values else 0.0
