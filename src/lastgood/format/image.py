"""The file image: which bytes stand at which offset of a checkpoint file.

A file is a row of records, each ``local header, data, data descriptor``, followed by the zip's directory. The layout
follows from the records' names and sizes alone; the checksums are filled in as the data goes by, so a file can be
written front to back in one pass. The zip format is that of PKWARE's APPNOTE.TXT 6.3.10, with zip64 where needed.
"""

import functools
import struct
from collections.abc import Sequence

import msgspec

from lastgood.format.spec import (
    BLOCKS_RECORD,
    BYTEORDER_RECORD,
    FORMAT_VERSION,
    INDEX_RECORD,
    PICKLE_RECORD,
    STORAGE_RECORD_PREFIX,
    TRAILER_RECORD,
    VERSION_RECORD,
    alignment_of,
    block_count,
)

LIMIT_32 = 0xFFFFFFFF
LIMIT_16 = 0xFFFF

_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
_EXTRA = struct.Struct("<HH")
_DESCRIPTOR_32 = struct.Struct("<4sIII")
_DESCRIPTOR_64 = struct.Struct("<4sIQQ")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_TRAILER = struct.Struct("<8sIIIIQQQQ16s")

END_SIZE = _END_64.size + _LOCATOR.size + _END.size
"""The last bytes of every file: zip64 end record, its locator, and the classic end record."""

TRAILER_SIZE = _TRAILER.size
TRAILER_DISTANCE = TRAILER_SIZE + _DESCRIPTOR_32.size
"""How far before the zip's directory the trailer's data begins."""

_FLAGS = 0x0808  # sizes and CRC follow in a data descriptor; names are UTF-8
_DOS_DATE = 0x0021  # 1980-01-01: the same state must give the same bytes
_ZIP64_ID = 0x0001
_PADDING_ID = 0x4246  # "FB", as torch pads
_MAGIC = b"LASTGOOD"


class Record(msgspec.Struct, frozen=True, gc=False):
    """One record and where it stands: its header, its data, and (right after the data) its descriptor."""

    name: str
    size: int
    header_offset: int
    data_offset: int

    @property
    def data_end(self) -> int:
        """The offset just after the data."""
        return self.data_offset + self.size

    @property
    def end(self) -> int:
        """The offset just after the descriptor, where the next header begins."""
        return self.data_end + (_DESCRIPTOR_32.size if self.size < LIMIT_32 else _DESCRIPTOR_64.size)


class Layout(msgspec.Struct, frozen=True):
    """All records of a file in order, and where the zip's directory begins and the file ends."""

    records: list[Record]
    directory_offset: int
    file_size: int

    @property
    def storages(self) -> list[Record]:
        """The records that hold tensor data, by storage number."""
        return self.records[FIRST_STORAGE:-_AFTER_STORAGES]

    @property
    def index(self) -> Record:
        """The record that holds the index."""
        return self.records[-3]

    @property
    def blocks(self) -> Record:
        """The record that holds the CRC-32 of every block of every record before it."""
        return self.records[-2]

    @property
    def trailer(self) -> Record:
        """The record that leads to the others; always the last one."""
        return self.records[-1]

    @property
    def ending(self) -> list[Record]:
        """The records after the storages: index, block table, trailer."""
        return self.records[-_AFTER_STORAGES:]

    @property
    def checked(self) -> list[Record]:
        """The records whose blocks the block table covers, in its order."""
        return self.records[:-2]

    def outside_span(self, number: int) -> tuple[int, int]:
        """The offsets of what lies before the data of record ``number``; past the last record, up to the end."""
        start = self.records[number - 1].data_end if number else 0
        return start, self.records[number].data_offset if number < len(self.records) else self.file_size


FIRST_STORAGE = 3
"""The record number of storage 0: data.pkl, version and byteorder stand before it."""

_AFTER_STORAGES = 3


class DataLayout(msgspec.Struct, frozen=True):
    """The records before the index, which do not depend on which save a file belongs to, and where they end."""

    records: list[Record]
    end: int
    directory_size: int


def plan_layout(pickle_size: int, byteorder_size: int, storage_sizes: Sequence[int], index_size: int) -> Layout:
    """Where everything goes, from sizes in bytes."""
    return lay_out_ending(lay_out_data(pickle_size, byteorder_size, storage_sizes), index_size)


def lay_out_data(pickle_size: int, byteorder_size: int, storage_sizes: Sequence[int]) -> DataLayout:
    """Where the pickle and the storages go; :func:`lay_out_ending` goes on from there."""
    names_and_sizes = [(PICKLE_RECORD, pickle_size), (VERSION_RECORD, 2), (BYTEORDER_RECORD, byteorder_size)]
    names_and_sizes += [(f"{STORAGE_RECORD_PREFIX}{number}", size) for number, size in enumerate(storage_sizes)]
    return _lay_out(names_and_sizes, DataLayout([], 0, 0))


def lay_out_ending(data: DataLayout, index_size: int) -> Layout:
    """The whole file, from the layout of its data and the size of its index."""
    blocks = block_count(index_size) + sum(block_count(record.size) for record in data.records)
    ending = [(INDEX_RECORD, index_size), (BLOCKS_RECORD, 4 * blocks), (TRAILER_RECORD, TRAILER_SIZE)]
    whole = _lay_out(ending, data)
    return Layout(whole.records, whole.end, whole.end + whole.directory_size + END_SIZE)


def _lay_out(names_and_sizes: list[tuple[str, int]], before: DataLayout) -> DataLayout:
    records = list(before.records)
    position, directory_size = before.end, before.directory_size
    for name, size in names_and_sizes:
        fixed_size = _LOCAL_HEADER.size + _EXTRA.size if size < LIMIT_32 else _LOCAL_HEADER.size + _EXTRA.size + 20
        alignment = alignment_of(size)
        data_offset = (position + fixed_size + len(name) + alignment - 1) & -alignment
        record = Record(name, size, position, data_offset)
        records.append(record)
        directory_size += _CENTRAL_HEADER.size + len(name)
        if size >= LIMIT_32 or position >= LIMIT_32:
            directory_size += _central_extra_size(record)
        position = data_offset + size + (_DESCRIPTOR_32.size if size < LIMIT_32 else _DESCRIPTOR_64.size)
    return DataLayout(records, position, directory_size)


def local_header(record: Record) -> bytes:
    """The bytes from the record's header to its data: header, name, zip64 sizes if needed, padding."""
    name = record.name.encode()
    extra_size = record.data_offset - record.header_offset - _LOCAL_HEADER.size - len(name)
    before, after = _header_around_name(record.size, len(name), extra_size)
    return before + name + after


@functools.lru_cache(maxsize=4096)
def _header_around_name(size: int, name_size: int, extra_size: int) -> tuple[bytes, bytes]:
    large = size >= LIMIT_32
    short_size = LIMIT_32 if large else size
    zip64 = struct.pack("<HHQQ", _ZIP64_ID, 16, size, size) if large else b""
    padding = extra_size - len(zip64) - _EXTRA.size
    version = 45 if large else 20
    before = _LOCAL_HEADER.pack(
        b"PK\x03\x04", version, _FLAGS, 0, 0, _DOS_DATE, 0, short_size, short_size, name_size, extra_size
    )
    return before, b"".join((zip64, _EXTRA.pack(_PADDING_ID, padding), bytes(padding)))


def data_descriptor(record: Record, crc: int) -> bytes:
    """The bytes that follow the record's data, with its CRC-32."""
    form = _DESCRIPTOR_64 if record.size >= LIMIT_32 else _DESCRIPTOR_32
    return form.pack(b"PK\x07\x08", crc, record.size, record.size)


def _central_extra_size(record: Record) -> int:
    fields = (16 if record.size >= LIMIT_32 else 0) + (8 if record.header_offset >= LIMIT_32 else 0)
    return fields + _EXTRA.size if fields else 0


def central_header(record: Record, crc: int) -> bytes:
    """The record's entry in the zip's directory."""
    large = record.size >= LIMIT_32
    far = record.header_offset >= LIMIT_32
    extra = b""
    if large or far:
        fields = [record.size, record.size] * large + [record.header_offset] * far
        extra = struct.pack(f"<HH{len(fields)}Q", _ZIP64_ID, 8 * len(fields), *fields)
    size = LIMIT_32 if large else record.size
    offset = LIMIT_32 if far else record.header_offset
    version = 45 if extra else 20
    name = record.name.encode()
    header = _CENTRAL_HEADER.pack(
        b"PK\x01\x02",
        version,
        version,
        _FLAGS,
        0,
        0,
        _DOS_DATE,
        crc,
        size,
        size,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        offset,
    )
    return header + name + extra


def directory(layout: Layout, crcs: list[int]) -> bytes:
    """Everything after the last record: the directory with each record's CRC-32, and the three end records."""
    entries = b"".join(map(central_header, layout.records, crcs))
    count, size, offset = len(layout.records), len(entries), layout.directory_offset
    end_offset = offset + size
    end_64 = _END_64.pack(b"PK\x06\x06", _END_64.size - 12, 45, 45, 0, 0, count, count, size, offset)
    locator = _LOCATOR.pack(b"PK\x06\x07", 0, end_offset, 1)
    short_count = min(count, LIMIT_16)
    end = _END.pack(b"PK\x05\x06", 0, 0, short_count, short_count, min(size, LIMIT_32), min(offset, LIMIT_32), 0)
    return b"".join((entries, end_64, locator, end))


def parse_end(data: bytes | memoryview, file_size: int) -> int | None:
    """The offset of the zip's directory, from the last ``END_SIZE`` bytes of a file; ``None`` if it is not ours."""
    if len(data) != END_SIZE:
        return None
    signature, _, _, _, _, _, _, count, size, offset = _END_64.unpack_from(data)
    if signature != b"PK\x06\x06" or offset + size + END_SIZE != file_size or count == 0:
        return None
    return int(offset) if offset >= TRAILER_DISTANCE else None


class Trailer(msgspec.Struct, frozen=True):
    """What the trailer says: where index and block table stand, their CRC-32, and the save's id (32 hex digits)."""

    format_version: int
    index_crc: int
    blocks_crc: int
    index_offset: int
    index_size: int
    blocks_offset: int
    blocks_size: int
    save_id: str


def pack_trailer(layout: Layout, index_crc: int, blocks_crc: int, save_id: str) -> bytes:
    """The data of the trailer record."""
    index, blocks = layout.index, layout.blocks
    return _TRAILER.pack(
        _MAGIC,
        FORMAT_VERSION,
        index_crc,
        blocks_crc,
        0,
        index.data_offset,
        index.size,
        blocks.data_offset,
        blocks.size,
        bytes.fromhex(save_id),
    )


def parse_trailer(data: bytes | memoryview) -> Trailer | None:
    """The trailer, from the ``TRAILER_DISTANCE`` bytes before the directory; ``None`` if they are not ours."""
    magic, version, index_crc, blocks_crc, _, index_offset, index_size, blocks_offset, blocks_size, save_id = (
        _TRAILER.unpack_from(data)
    )
    if magic != _MAGIC:
        return None
    return Trailer(version, index_crc, blocks_crc, index_offset, index_size, blocks_offset, blocks_size, save_id.hex())
