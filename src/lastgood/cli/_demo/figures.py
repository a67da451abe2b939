"""What the lives of a run add up to, and what two runs have in common."""

from statistics import median

import msgspec

from lastgood.cli._demo.protocol import Resumed, SaveDone, SaveReturned, Staged, StepDone
from lastgood.cli._demo.supervisor import Life


class Spread(msgspec.Struct, frozen=True):
    """Of how long something took, in seconds."""

    median: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """The spread of these values."""
        return cls(_median(seconds), max(seconds, default=0.0))


class Figures(msgspec.Struct, frozen=True):
    """One run in numbers; a median or maximum of nothing is 0."""

    kills: int
    kills_in_save: int
    kills_after_staging: int
    landed_after_kill: int
    steps: int
    steps_repeated: int
    passed_over: int
    checkpoints: int
    checkpoint_bytes: int
    stall: Spread
    stall_share: float
    staging: Spread
    durable: Spread
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
    events = [event for life in lives for event in life.events]
    saves = [event for event in events if isinstance(event, SaveDone)]
    steps = [event for event in events if isinstance(event, StepDone)]
    resumed = [event for life in lives[1:] for event in life.events if isinstance(event, Resumed)]
    stalls = [seconds for life in lives for seconds in _stalls(life)]
    # The time that steps were held back is part of theirs, that until saves returned is not.
    trained = sum(event.seconds for event in events if isinstance(event, StepDone | SaveReturned))
    return Figures(
        kills=len(kills),
        kills_in_save=sum(kill.in_save for kill in kills),
        kills_after_staging=sum(kill.moment == "staged" for kill in kills),
        landed_after_kill=sum(len(life.landed) for life in lives),
        steps=max((step.step for step in steps), default=0),
        steps_repeated=sum(repeated_steps(lives)),
        passed_over=sum(len(event.passed_over) for event in resumed),
        checkpoints=len(saves) + sum(len(life.landed) for life in lives),
        checkpoint_bytes=saves[-1].nbytes if saves else 0,
        stall=Spread.of(stalls),
        stall_share=sum(stalls) / trained if trained else 0.0,
        staging=Spread.of([event.seconds for event in events if isinstance(event, Staged)]),
        durable=Spread.of([save.seconds for save in saves]),
        load_median_seconds=_median([event.seconds for event in resumed]),
        restart_median_seconds=_median([life.start_seconds for life in lives[1:]]),
    )


def _stalls(life: Life) -> list[float]:
    """For each save how long the training stood still: until it returned, and while steps after it were held back."""
    stalls: list[float] = []
    for event in life.events:
        if isinstance(event, SaveReturned):
            stalls.append(event.seconds)
        elif isinstance(event, StepDone) and stalls:
            stalls[-1] += event.held_seconds
    return stalls


def repeated_spans(lives: list[Life]) -> list[tuple[int, int]]:
    """For each restart, from where to where it did steps again that had been done before.

    A life may resume from a checkpoint that landed only after the life before it had begun.
    """
    spans = []
    furthest = lives[0].last_step
    for life in lives[1:]:
        spans.append((life.first_step, max(life.first_step, min(life.last_step, furthest))))
        furthest = max(furthest, life.last_step)
    return spans


def repeated_steps(lives: list[Life]) -> list[int]:
    """For each restart, how many steps it did again."""
    return [end - start for start, end in repeated_spans(lives)]


def _median(values: list[float]) -> float:
    return median(values) if values else 0.0
