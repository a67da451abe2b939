"""An index in two parts: the head says which save a file belongs to, the body what is in the file.

The body is known when a state is captured; the head, when somebody writes it. Joined they are the canonical index.
"""

import math
from typing import Any, TypeGuard

import msgspec

from lastgood.format.index import Index, encode_index
from lastgood.format.spec import FORMAT_VERSION

_BODY_START = b'"byteorder"'
_encoder = msgspec.json.Encoder()


class IndexHead(msgspec.Struct, frozen=True, kw_only=True):
    """The members of an index that differ from save to save, in the order of :class:`~lastgood.format.index.Index`."""

    format_version: int = FORMAT_VERSION
    save_id: str
    rank: int
    world_size: int
    step: int | None
    independent: bool
    saved_at: float | None = None
    metrics: dict[str, float | None] | None = None


UNSAVED = IndexHead(save_id="0" * 32, rank=0, world_size=1, step=None, independent=False)
"""The head of an image that belongs to no save."""

LARGEST_METRICS = 4096
"""How many bytes of JSON the metrics of a save may take."""

LARGEST_HEAD = 512 + LARGEST_METRICS
"""More bytes than the head of any save takes."""


_LONGEST_STEP_BITS = 512


def noted_in_head(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a save's arguments that the head of its file notes: ``step``, ``saved_at`` and ``metrics``.

    They are ``None`` where they are not given, or are something else than a head can hold: hooks may have arguments
    of these names, too.
    """
    step, saved_at, metrics = (arguments.get(name) for name in ("step", "saved_at", "metrics"))
    return {
        "step": step if type(step) is int and step.bit_length() <= _LONGEST_STEP_BITS else None,
        "saved_at": saved_at if type(saved_at) is float and math.isfinite(saved_at) else None,
        "metrics": {name: _finite(value) for name, value in metrics.items()} if are_metrics(metrics) else None,
    }


def are_metrics(value: Any) -> TypeGuard[dict[str, int | float]]:
    """Whether this is a dict of numbers under strings that takes at most :data:`LARGEST_METRICS` bytes."""
    if not isinstance(value, dict):
        return False
    if any(type(name) is not str or type(number) not in (int, float) for name, number in value.items()):
        return False
    try:
        return len(_encoder.encode({name: _finite(number) for name, number in value.items()})) <= LARGEST_METRICS
    except UnicodeEncodeError:
        return False


def _finite(number: int | float) -> float | None:
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:
        return None


def encode_body(index: Index) -> bytes:
    """The index without its head."""
    encoded = encode_index(index)
    # No member of the head is text of the user's: the first place that looks like the body's beginning is that.
    return encoded[encoded.index(_BODY_START) :]


def join_index(head: IndexHead, body: bytes | memoryview) -> bytes:
    """The whole index, byte for byte what :func:`~lastgood.format.index.encode_index` gives."""
    return b"".join((_encoder.encode(head)[:-1], b",", body))
