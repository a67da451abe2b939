"""Which save a file belongs to, found without reading the description of all that is in it."""

from dataclasses import dataclass

import msgspec

from lastgood.errors import CorruptCheckpointError
from lastgood.format.image import END_SIZE, TRAILER_DISTANCE, TRAILER_SIZE, parse_end, parse_trailer
from lastgood.format.spec import FORMAT_VERSION, crc32
from lastgood.storage.base import StoredFile


@dataclass(frozen=True)
class FileIdentity:
    """A file of ours: of which save, of which rank, and what tells it from every other file.

    ``trailer_crc`` is the CRC-32 of its trailer, which covers the checksums of all else in the file.
    """

    save_id: str
    rank: int
    world_size: int
    independent: bool
    size: int
    trailer_crc: int


class _IndexHead(msgspec.Struct):
    """The members of an index that say whose it is; the others, large ones among them, are skipped."""

    save_id: str
    rank: int
    world_size: int
    independent: bool


def read_identity(file: StoredFile) -> FileIdentity | None:
    """The identity of a file, or ``None`` if lastgood did not write it.

    Checks the index against its checksum and nothing else. Raises
    :class:`~lastgood.errors.CorruptCheckpointError` where that fails.
    """
    if file.size < END_SIZE + TRAILER_DISTANCE:
        return None
    directory_offset = parse_end(_read(file, file.size - END_SIZE, END_SIZE), file.size)
    if directory_offset is None:
        return None
    ending = _read(file, directory_offset - TRAILER_DISTANCE, TRAILER_DISTANCE)
    trailer = parse_trailer(ending)
    if trailer is None:
        return None
    if trailer.format_version > FORMAT_VERSION:
        raise _unreadable(file, f"its format version is {trailer.format_version}; this lastgood knows {FORMAT_VERSION}")
    if trailer.index_offset + trailer.index_size > file.size:
        raise _unreadable(file, "its trailer places the index beyond its end")
    index_bytes = _read(file, trailer.index_offset, trailer.index_size)
    if crc32(index_bytes) != trailer.index_crc:
        raise _unreadable(file, "its index does not match its checksum")
    try:
        head = msgspec.json.decode(index_bytes, type=_IndexHead)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(file, f"its index cannot be right: {error}") from error
    trailer_crc = crc32(ending[:TRAILER_SIZE])
    return FileIdentity(head.save_id, head.rank, head.world_size, head.independent, file.size, trailer_crc)


def _unreadable(file: StoredFile, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file.path} cannot be identified: {what}.", path=file.path)


def _read(file: StoredFile, offset: int, size: int) -> bytes:
    target = bytearray(size)
    file.read_into(offset, memoryview(target))
    return bytes(target)
