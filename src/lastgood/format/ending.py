"""The end of a file of ours, where reading it begins: found by its place, checked before it is believed."""

from dataclasses import dataclass

from lastgood.errors import corrupt
from lastgood.format.image import END_SIZE, TRAILER_DISTANCE, TRAILER_SIZE, Trailer, parse_end, parse_trailer
from lastgood.format.spec import FORMAT_VERSION, INDEX_RECORD, crc32
from lastgood.storage.base import StoredFile

_TAIL_SIZE = 64 * 1024


@dataclass(frozen=True)
class Ending:
    """The trailer of a file and where it stands, with the last bytes of the file as they were read."""

    file: StoredFile
    trailer: Trailer
    trailer_offset: int
    trailer_and_descriptor: bytes
    tail: bytes

    @property
    def trailer_bytes(self) -> bytes:
        """The data of the trailer record."""
        return self.trailer_and_descriptor[:TRAILER_SIZE]

    def read_index(self) -> bytes:
        """The bytes of the index, compared with their checksum."""
        index_bytes = _fetch(self.file, self.tail, self.trailer.index_offset, self.trailer.index_size)
        if crc32(index_bytes) != self.trailer.index_crc:
            raise corrupt(self.file.path, f"the record {INDEX_RECORD} does not match its checksum")
        return index_bytes

    def read_blocks(self) -> bytes:
        """The bytes of the block table, compared with their checksum."""
        blocks_bytes = _fetch(self.file, self.tail, self.trailer.blocks_offset, self.trailer.blocks_size)
        if crc32(blocks_bytes) != self.trailer.blocks_crc:
            raise corrupt(self.file.path, "the table of block checksums does not match its own checksum")
        return blocks_bytes


def find_ending(file: StoredFile, tail_size: int = _TAIL_SIZE) -> Ending | None:
    """The ending of ``file``, or ``None`` if lastgood did not write it; ``tail_size`` bytes are read in one go.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for a trailer that leads nowhere.
    """
    if file.size < END_SIZE + TRAILER_DISTANCE:
        return None
    tail_size = min(file.size, tail_size)
    tail = _fetch(file, b"", file.size - tail_size, tail_size)
    directory_offset = parse_end(tail[-END_SIZE:], file.size)
    if directory_offset is None:
        return None
    trailer_offset = directory_offset - TRAILER_DISTANCE
    trailer_and_descriptor = _fetch(file, tail, trailer_offset, TRAILER_DISTANCE)
    trailer = parse_trailer(trailer_and_descriptor)
    if trailer is None:
        return None
    _check(file, trailer, trailer_offset)
    return Ending(file, trailer, trailer_offset, trailer_and_descriptor, tail)


def _check(file: StoredFile, trailer: Trailer, trailer_offset: int) -> None:
    if trailer.format_version > FORMAT_VERSION:
        raise corrupt(
            file.path,
            f"its trailer asks for format version {trailer.format_version}, this lastgood reads up to {FORMAT_VERSION} "
            "(if a newer lastgood wrote it, it is not damaged: update lastgood)",
        )
    if not 0 < trailer.index_offset <= trailer.index_offset + trailer.index_size < trailer.blocks_offset:
        raise corrupt(file.path, "its trailer places the index where it cannot be")
    if trailer.blocks_offset + trailer.blocks_size > trailer_offset or trailer.blocks_size % 4:
        raise corrupt(file.path, "its trailer places the block table where it cannot be")


def _fetch(file: StoredFile, tail: bytes, offset: int, size: int) -> bytes:
    """Bytes of the file, from ``tail`` (its last bytes) if they are there."""
    start = offset - (file.size - len(tail))
    if start >= 0 and tail:
        return tail[start : start + size]
    target = bytearray(size)
    file.read_into(offset, memoryview(target))
    return bytes(target)
