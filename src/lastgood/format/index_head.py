"""An index in two parts: the head says which save a file belongs to, the body what is in the file.

The body is known when a state is captured; the head, when somebody writes it. Joined they are the canonical index.
"""

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


UNSAVED = IndexHead(save_id="0" * 32, rank=0, world_size=1, step=None, independent=False)
"""The head of an image that belongs to no save."""

LARGEST_HEAD = 256
"""More bytes than the head of any save takes."""


def encode_body(index: Index) -> bytes:
    """The index without its head."""
    encoded = encode_index(index)
    # No member of the head is text of the user's: the first place that looks like the body's beginning is that.
    return encoded[encoded.index(_BODY_START) :]


def join_index(head: IndexHead, body: bytes | memoryview) -> bytes:
    """The whole index, byte for byte what :func:`~lastgood.format.index.encode_index` gives."""
    return b"".join((_encoder.encode(head)[:-1], b",", body))
