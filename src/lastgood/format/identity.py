"""Which save a file belongs to, found without reading the description of all that is in it."""

from dataclasses import dataclass

import msgspec

from lastgood.errors import corrupt
from lastgood.format.ending import find_ending
from lastgood.format.image import END_SIZE
from lastgood.format.spec import crc32
from lastgood.storage.base import StoredFile


@dataclass(frozen=True)
class FileIdentity:
    """A file of ours: of which save, of which rank, and what tells it from every other file.

    ``trailer_crc`` is the CRC-32 of its trailer, which covers the checksums of all else in the file. ``step``,
    ``saved_at`` and ``metrics`` are those of :class:`~lastgood.format.index.Index`.
    """

    save_id: str
    rank: int
    world_size: int
    independent: bool
    size: int
    trailer_crc: int
    step: int | None = None
    saved_at: float | None = None
    metrics: dict[str, float | None] | None = None


class _IndexHead(msgspec.Struct):
    """The members of an index that say whose it is; the others, large ones among them, are skipped."""

    save_id: str
    rank: int
    world_size: int
    independent: bool
    step: int | None
    saved_at: float | None
    metrics: dict[str, float | None] | None


def read_identity(file: StoredFile) -> FileIdentity | None:
    """The identity of a file, or ``None`` if lastgood did not write it.

    Checks the index against its checksum and nothing else. Raises
    :class:`~lastgood.errors.CorruptCheckpointError` where that fails.
    """
    ending = find_ending(file, tail_size=END_SIZE)
    if ending is None:
        return None
    try:
        head = msgspec.json.decode(ending.read_index(), type=_IndexHead)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise corrupt(file.path, f"its index cannot be right: {error}") from error
    trailer_crc = crc32(ending.trailer_bytes)
    return FileIdentity(**msgspec.structs.asdict(head), size=file.size, trailer_crc=trailer_crc)
