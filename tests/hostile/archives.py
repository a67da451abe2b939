"""Zip archives of any records in any order, laid out and sealed as lastgood and torch do it."""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

from tests.hostile.zip_fields import records_of

from lastgood.format.spec import BLOCK_SIZE, alignment_of

PICKLE = b"archive/data.pkl"
INDEX = b"archive/.lastgood/index.json"
BLOCKS = b"archive/.lastgood/blocks.crc32"
TRAILER = b"archive/.lastgood/trailer"


class Stored(NamedTuple):
    """A record to be written. ``at``: the number of the record whose header the directory gives as its own."""

    name: bytes
    data: bytes
    at: int | None = None
    in_directory: bool = True
    in_file: bool = True


def stored_in(data: bytes) -> list[Stored]:
    """The records of a whole file."""
    found = []
    for record in records_of(data):
        name = data[record.header_offset + 30 : record.header_offset + 30 + record.name_size]
        found.append(Stored(name, data[record.data_offset : record.data_end]))
    return found


def archive_of(records: Sequence[Stored]) -> bytes:
    """The archive with these records; for those of a file of ours, in their order, it is that file."""
    body, offsets = bytearray(), []
    for record in records:
        offsets.append(len(body))
        if record.in_file:
            body += _header(record, len(body)) + record.data
            body += struct.pack("<4sIII", b"PK\x07\x08", crc32(record.data), len(record.data), len(record.data))
    listed = [record for record in records if record.in_directory]
    directory = b"".join(
        _entry(record, offsets[number if record.at is None else record.at % len(offsets)])
        for number, record in enumerate(records)
        if record.in_directory
    )
    return bytes(body) + directory + _end(len(listed), len(directory), len(body))


def _header(record: Stored, offset: int) -> bytes:
    begin = offset + 30 + len(record.name) + 4
    boundary = alignment_of(len(record.data))
    padding = (begin + boundary - 1) // boundary * boundary - begin
    fields = (20, 0x0808, 0, 0, 0x0021, 0, len(record.data), len(record.data), len(record.name), 4 + padding)
    header = b"PK\x03\x04" + struct.pack("<5H3I2H", *fields) + record.name
    return header + struct.pack("<HH", 0x4246, padding) + bytes(padding)


def _entry(record: Stored, offset: int) -> bytes:
    sizes = (crc32(record.data), len(record.data), len(record.data))
    fields = (20, 20, 0x0808, 0, 0, 0x0021, *sizes, len(record.name), 0, 0, 0, 0, 0, offset)
    return b"PK\x01\x02" + struct.pack("<6H3I5H2I", *fields) + record.name


def _end(count: int, size: int, offset: int) -> bytes:
    end_64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    return end_64 + locator + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, offset, 0)


def with_trailer_in_place(records: Sequence[Stored]) -> bytes:
    """The same, once the trailer leads to where index and block table stand now, and its own record is sealed."""
    places: dict[bytes, tuple[int, int]] = {}
    position = 0
    for record in records:
        if record.in_file:
            begin = position + len(_header(record, position))
            places[record.name] = (begin, len(record.data))
            position = begin + len(record.data) + 16
    if INDEX not in places or BLOCKS not in places:
        return archive_of(records)
    return archive_of([_leading_to(record, *places[INDEX], *places[BLOCKS]) for record in records])


def _leading_to(record: Stored, *places: int) -> Stored:
    if record.name != TRAILER or len(record.data) != 72:
        return record
    return record._replace(data=record.data[:24] + struct.pack("<4Q", *places) + record.data[56:])


def sealed(records: Sequence[Stored]) -> bytes:
    """A file of ours with these records, with the block table and the trailer that they should have."""
    table = b"".join(
        struct.pack("<I", crc32(record.data[start : start + BLOCK_SIZE]))
        for record in records
        if record.name not in (BLOCKS, TRAILER)
        for start in range(0, len(record.data), BLOCK_SIZE)
    )
    index = next(record.data for record in records if record.name == INDEX)
    crcs = struct.pack("<II", crc32(index), crc32(table))
    fixed = []
    for record in records:
        if record.name == BLOCKS:
            record = record._replace(data=table)
        elif record.name == TRAILER:
            record = record._replace(data=record.data[:12] + crcs + record.data[20:])
        fixed.append(record)
    return with_trailer_in_place(fixed)


def replaced(records: Sequence[Stored], contents: Mapping[bytes, bytes]) -> list[Stored]:
    """The records with other contents under these names."""
    return [record._replace(data=contents.get(record.name, record.data)) for record in records]


def contents_of(records: Sequence[Stored], name: bytes) -> bytes:
    """The bytes of the record of this name."""
    return next(record.data for record in records if record.name == name)
