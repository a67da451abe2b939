"""Every field of a zip archive, found with struct alone, and values that are at its limits."""

import io
import struct
import zipfile
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

_LOCAL = "signature:4 version:2 flags:2 method:2 time:2 date:2 crc:4 packed:4 size:4 name_size:2 extra_size:2"
_EXTRA = "extra_id:2 extra_length:2"
_DESCRIPTOR = "signature:4 crc:4 packed:4 size:4"
_CENTRAL = (
    "signature:4 made_by:2 version:2 flags:2 method:2 time:2 date:2 crc:4 packed:4 size:4 name_size:2 extra_size:2 "
    "comment_size:2 disk:2 internal:2 external:4 header_offset:4"
)
_END_64 = (
    "signature:4 length:8 made_by:2 version:2 disk:4 directory_disk:4 count_here:8 count:8 directory_size:8 "
    "directory_offset:8"
)
_LOCATOR = "signature:4 disk:4 end_offset:8 disks:4"
_END = "signature:4 disk:2 directory_disk:2 count_here:2 count:2 directory_size:4 directory_offset:4 comment_size:2"
_TRAILER = (
    "magic:8 version:4 index_crc:4 blocks_crc:4 zero:4 index_offset:8 index_size:8 blocks_offset:8 blocks_size:8 "
    "save_id:8 save_id_end:8"
)
_ENDS = 98
"""The three records at the end of every file."""


class ZipRecord(NamedTuple):
    """One record, by the last part of its name; all offsets count from the start of the file."""

    name: str
    size: int
    header_offset: int
    data_offset: int
    entry_offset: int
    name_size: int

    @property
    def data_end(self) -> int:
        """Where its data descriptor begins."""
        return self.data_offset + self.size


class Field(NamedTuple):
    """A number in a file, least significant byte first: which one, of what, and where it stands."""

    name: str
    owner: str
    offset: int
    width: int

    def value(self, data: bytes) -> int:
        """What stands there."""
        return int.from_bytes(data[self.offset : self.offset + self.width], "little")

    def replaced(self, data: bytes, value: int) -> bytes:
        """The file with another number there."""
        return data[: self.offset] + value.to_bytes(self.width, "little") + data[self.offset + self.width :]


def _fields(form: str, owner: str, offset: int) -> Iterator[Field]:
    for word in form.split():
        name, width = word.split(":")
        yield Field(name, owner, offset, int(width))
        offset += int(width)


def records_of(data: bytes) -> list[ZipRecord]:
    """The records of a whole file, in the order of its directory."""
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry_offset = archive.start_dir
        for info in archive.infolist():
            name_size, extra_size = struct.unpack_from("<HH", data, info.header_offset + 26)
            data_offset = info.header_offset + 30 + name_size + extra_size
            name = info.filename.rpartition("/")[2]
            found.append(ZipRecord(name, info.file_size, info.header_offset, data_offset, entry_offset, name_size))
            entry_offset += 46 + sum(struct.unpack_from("<HHH", data, entry_offset + 28))
    return found


def fields_of(data: bytes) -> list[Field]:
    """The fields of every header, descriptor, directory entry and end record of a whole file, and of our trailer."""
    found: list[Field] = []
    for record in records_of(data):
        name, header = record.name, record.header_offset
        found += _fields(_LOCAL, f"local header of {name}", header)
        if header + 30 + record.name_size < record.data_offset:
            found += _fields(_EXTRA, f"local header of {name}", header + 30 + record.name_size)
        found += _fields(_DESCRIPTOR, f"descriptor of {name}", record.data_end)
        found += _fields(_CENTRAL, f"directory entry of {name}", record.entry_offset)
        if name == "trailer":
            found += _fields(_TRAILER, "trailer", record.data_offset)
    end = len(data) - _ENDS
    found += _fields(_END_64, "zip64 end", end)
    found += _fields(_LOCATOR, "zip64 locator", end + 56)
    found += _fields(_END, "end", end + 76)
    return found


def limits_of(field: Field, data: bytes, others: list[Field]) -> list[int]:
    """The other values that this field is tried with: limits, the file's size, neighbours, those of other records."""
    largest = (1 << 8 * field.width) - 1
    now = field.value(data)
    values = {0, 1, now - 1, now + 1, largest - 1, largest, len(data) - 1, len(data), len(data) + 1}
    # As signed numbers, the largest and the smallest one.
    values |= {largest >> 1, (largest >> 1) + 1}
    values |= {other.value(data) for other in others if (other.name, other.width) == (field.name, field.width)}
    return sorted(value for value in values if 0 <= value <= largest and value != now)


def edits_of(data: bytes) -> list[tuple[Field, int]]:
    """Every field with every value that it is tried with."""
    fields = fields_of(data)
    return [(field, value) for field in fields for value in limits_of(field, data, fields)]


def resealed(data: bytes, whole: bytes) -> bytes:
    """The file with every checksum made right for the data that its records hold now.

    ``whole`` tells where the records are. A field that is no checksum stays as it is.
    """
    records, sealed = records_of(whole), bytearray(data)
    by_name = {record.name: record for record in records}
    trailer = by_name.get("trailer")
    if trailer is not None:
        at = {field.name: field.offset for field in _fields(_TRAILER, "trailer", trailer.data_offset)}
        blocks, table = by_name["blocks.crc32"], bytearray()
        for record in records[:-2]:
            if record.size:  # small files: a record is one block
                table += struct.pack("<I", _crc(sealed, record))
        sealed[blocks.data_offset : blocks.data_end] = table
        struct.pack_into("<I", sealed, at["index_crc"], _crc(sealed, by_name["index.json"]))
        struct.pack_into("<I", sealed, at["blocks_crc"], _crc(sealed, blocks))
    for record in records:
        crc = _crc(sealed, record)
        struct.pack_into("<I", sealed, record.data_end + 4, crc)
        struct.pack_into("<I", sealed, record.entry_offset + 16, crc)
    return bytes(sealed)


def _crc(data: bytearray, record: ZipRecord) -> int:
    return crc32(data[record.data_offset : record.data_end])
