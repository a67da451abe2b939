"""What the demo and its training process tell each other: settings one way, events the other, as lines of JSON."""

from typing import TypeAlias

import msgspec


class ModelShape(msgspec.Struct, frozen=True):
    """The size of the GPT; ``context`` is how many bytes of text it sees at once."""

    layers: int = 4
    width: int = 192
    heads: int = 6
    context: int = 64


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a training run depends on. Two runs with equal settings end with equal bits."""

    checkpoints: str
    steps: int
    save_every: int
    seed: int
    keep: int = 3
    batch_size: int = 8
    model: ModelShape = ModelShape()


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """The training stands at ``step``: 0 for a fresh start. ``passed_over`` says which checkpoints would not load.

    ``checkpoint_process`` is the number of the process that writes this training's checkpoints.
    """

    step: int
    seconds: float
    passed_over: tuple[str, ...] = ()
    checkpoint_process: int | None = None


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """One optimizer step is over. In ``held_seconds`` of its ``seconds`` it waited until a snapshot was staged."""

    step: int
    loss: float
    seconds: float
    held_seconds: float = 0.0


class SaveBegins(msgspec.Struct, frozen=True, tag=True):
    """The state of ``step`` is about to be saved. All times of this save count from here on."""

    step: int


class SaveReturned(msgspec.Struct, frozen=True, tag=True):
    """The training goes on, after ``seconds``."""

    step: int
    seconds: float


class Staged(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint survives the death of the training process from now on."""

    step: int
    seconds: float


class SaveDone(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint is durable."""

    step: int
    seconds: float
    nbytes: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """All steps are done. ``fingerprint`` is that of the state in the memory of the training process."""

    fingerprint: str


SaveEvent: TypeAlias = SaveBegins | SaveReturned | Staged | SaveDone
Event: TypeAlias = Resumed | StepDone | SaveEvent | Finished

_decoder = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    """The event as one line."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    """The event of one line that :func:`encode` made."""
    event: Event = _decoder.decode(line)
    return event
