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
    """The training stands at ``step``: 0 for a fresh start. ``passed_over`` says which checkpoints would not load."""

    step: int
    seconds: float
    passed_over: tuple[str, ...] = ()


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """One optimizer step is over."""

    step: int
    loss: float
    seconds: float


class SaveBegins(msgspec.Struct, frozen=True, tag=True):
    """The training stands still from here on, until :class:`SaveDone`."""

    step: int


class SaveDone(msgspec.Struct, frozen=True, tag=True):
    """The checkpoint of ``step`` is durable; the training stood still for ``seconds``."""

    step: int
    seconds: float
    nbytes: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """All steps are done. ``fingerprint`` is that of the state in the memory of the training process."""

    fingerprint: str


Event: TypeAlias = Resumed | StepDone | SaveBegins | SaveDone | Finished

_decoder = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    """The event as one line."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    """The event of one line that :func:`encode` made."""
    event: Event = _decoder.decode(line)
    return event
