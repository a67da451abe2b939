"""Where the records of a zip file stand, read with struct alone: a second opinion on what lastgood wrote."""

import struct
from dataclasses import dataclass
from typing import BinaryIO

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class ZipRecord:
    """One record as directory and local header describe it; all offsets count from the start of the file."""

    name: str
    method: int
    crc: int
    size: int
    header_offset: int
    data_offset: int
    entry_offset: int
    local_extra: bytes

    @property
    def descriptor(self) -> struct.Struct:
        """The form of the data descriptor that follows the data."""
        return struct.Struct("<4sIQQ" if self.size >= FULL_32 else "<4sIII")

    @property
    def end(self) -> int:
        """The offset after the data descriptor."""
        return self.data_offset + self.size + self.descriptor.size


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def read_layout(file: BinaryIO) -> tuple[list[ZipRecord], int]:
    """All records in the order of the directory, and where the directory begins."""
    file_size = file.seek(0, 2)
    end = _END.unpack(_at(file, file_size - _END.size, _END.size))
    assert end[0] == b"PK\x05\x06"
    assert end[7] == 0, "a comment"
    locator_offset = file_size - _END.size - _LOCATOR.size
    signature, disk, end_64_offset, disks = _LOCATOR.unpack(_at(file, locator_offset, _LOCATOR.size))
    assert (signature, disk, disks) == (b"PK\x06\x07", 0, 1)
    end_64 = _END_64.unpack(_at(file, end_64_offset, _END_64.size))
    assert end_64[0] == b"PK\x06\x06"
    assert end_64_offset + 12 + end_64[1] == locator_offset
    count, size, offset = end_64[7:10]
    assert end_64[6] == count
    # What the classic record has room for, it says too.
    assert end[3:7] == (min(count, FULL_16), min(count, FULL_16), min(size, FULL_32), min(offset, FULL_32))
    assert offset + size == end_64_offset
    directory = _at(file, offset, size)
    records, position = [], 0
    while position < size:
        record, length = _read_record(file, directory, position, offset + position)
        records.append(record)
        position += length
    assert (len(records), position) == (count, size)
    return records, offset


def _read_record(file: BinaryIO, directory: bytes, position: int, entry_offset: int) -> tuple[ZipRecord, int]:
    entry = _CENTRAL.unpack_from(directory, position)
    assert entry[0] == b"PK\x01\x02"
    crc, packed, size, name_length, extra_length, comment_length = entry[7:13]
    offset = entry[16]
    assert packed == size
    name_start = position + _CENTRAL.size
    name = directory[name_start : name_start + name_length]
    extra = directory[name_start + name_length : name_start + name_length + extra_length]
    large = [name for name, value in (("size", size), ("packed", packed), ("offset", offset)) if value == FULL_32]
    values = dict(zip(large, _zip64_fields(extra), strict=True))
    size, offset = values.get("size", size), values.get("offset", offset)
    assert values.get("packed", packed) == size
    assert (entry[2] >= 45) == bool(values), "the version needed to extract says whether it is zip64"
    local = _LOCAL.unpack(_at(file, offset, _LOCAL.size))
    assert local[0] == b"PK\x03\x04"
    assert local[2:4] == entry[3:5], "flags and method"
    assert local[2] & 0x8, "sizes and CRC follow in a data descriptor"
    assert local[9] == name_length
    assert _at(file, offset + _LOCAL.size, name_length) == name
    local_extra = _at(file, offset + _LOCAL.size + name_length, local[10])
    assert local[7] == local[8] == min(size, FULL_32)
    assert _zip64_fields(local_extra) == ([size, size] if size >= FULL_32 else [])
    data_offset = offset + _LOCAL.size + name_length + local[10]
    record = ZipRecord(name.decode(), entry[4], crc, size, offset, data_offset, entry_offset, local_extra)
    return record, _CENTRAL.size + name_length + extra_length + comment_length


def _zip64_fields(extra: bytes) -> list[int]:
    """The numbers in the zip64 field of an extra block; all its fields must fit exactly."""
    found: list[int] = []
    position = 0
    while position < len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            found = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
        position += 4 + length
    assert position == len(extra)
    return found
