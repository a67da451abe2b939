"""The directory of a zip archive that torch wrote, read so strictly that torch cannot see another one in it."""

import io
import struct
import zipfile
from typing import Any

import msgspec

from lastgood.errors import UnsafeCheckpointError, corrupt
from lastgood.format.spec import LASTGOOD_DIRECTORY
from lastgood.storage.base import StoredFile

_LOCAL_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ENTRY = struct.Struct("<4s24xHHH12x")
"""A directory entry's signature, and the sizes of its name, its extra field and its comment, which follow it."""

_DIRECTORY_WINDOW = 256 * 1024
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_PLAIN_FLAGS = 0x0808  # sizes in a data descriptor, names in UTF-8
_IS_DIRECTORY = 0x10
_SATURATED = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)


class ZipRecord(msgspec.Struct, frozen=True, gc=False):
    """One record: where its header and its uncompressed data stand, and the CRC-32 that the directory gives for it."""

    name: str
    header_offset: int
    offset: int
    size: int
    crc: int


def is_zip(file: StoredFile) -> bool:
    """Whether torch.load would read this file as a zip archive."""
    return _read(file, 0, min(4, file.size)) == _LOCAL_SIGNATURE


def read_directory(file: StoredFile) -> dict[str, ZipRecord]:
    """The archive's records in the directory's order, by lower-case name (torch looks names up without regard to case).

    Raises :class:`~lastgood.errors.CorruptCheckpointError` unless all lie in the file and apart from each other, and
    :class:`~lastgood.errors.UnsafeCheckpointError` for what ``torch.save`` never writes.
    """
    count, size, directory_offset = _find_directory(file)
    _require_entries(file, count, size, directory_offset)
    try:
        with zipfile.ZipFile(_Reader(file)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise corrupt(file.path, f"its zip directory cannot be read: {error}") from error
    if any(f"/{LASTGOOD_DIRECTORY}" in f"/{info.filename}" for info in infos):
        raise corrupt(file.path, "lastgood wrote it, but the trailer that leads to its index cannot be read")
    records = [_read_record(file, info) for info in infos]
    by_name = {record.name.lower(): record for record in records}
    if len(by_name) != len(records):
        raise corrupt(file.path, "two of its records have the same name")
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < end:
            raise corrupt(file.path, f"its record {record.name!r} overlaps the one before it")
        end = record.offset + record.size
    if end > directory_offset:
        raise corrupt(file.path, "its last record overlaps the zip directory")
    return by_name


def _find_directory(file: StoredFile) -> tuple[int, int, int]:
    """How many records the directory has, its size and where it begins, from the end of the file.

    That must be the archive's end, too.
    """
    end_offset = file.size - _END.size
    cut = corrupt(file.path, "it does not end as a zip archive does: it was cut off, or something was appended to it")
    spread = corrupt(file.path, "a part of its zip directory is said to be on another disk")
    if end_offset < 0:
        raise cut
    signature, *disks, here, count, size, offset, comment = _END.unpack(_read(file, end_offset, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise cut
    if any(disks) or here != count:
        raise spread
    locator_offset = end_offset - _LOCATOR.size
    locator = _read(file, locator_offset, _LOCATOR.size) if locator_offset >= 0 else b""
    if locator.startswith(b"PK\x06\x07"):
        short = (count, size, offset)
        end_offset = locator_offset - _END_64.size
        _, disk, end_64_offset, disk_count = _LOCATOR.unpack(locator)
        if end_offset < 0 or end_64_offset != end_offset:
            raise cut
        end_64 = _END_64.unpack(_read(file, end_offset, _END_64.size))
        signature, length, _, _, *disks, here, count, size, offset = end_64
        if signature != b"PK\x06\x06" or length != _END_64.size - 12:
            raise cut
        if disk or disk_count != 1 or any(disks) or here != count:
            raise spread
        if any(a not in (b, limit) for a, b, limit in zip(short, (count, size, offset), _SATURATED, strict=True)):
            raise corrupt(file.path, "the two ends of its zip directory say different things")
    if offset + size != end_offset:
        raise cut
    return count, size, offset


def _require_entries(file: StoredFile, count: int, size: int, offset: int) -> None:
    """The directory is as many entries as it announces, one after the other, and nothing else.

    Nothing is read on the strength of a size alone: the directory of a file with a hole in it may be any size.
    """
    position, end = offset, offset + size
    window, window_offset = b"", offset
    for _ in range(count):
        if position + _ENTRY.size > end:
            raise corrupt(file.path, f"its zip directory announces {count} records and ends before the last")
        if position + _ENTRY.size > window_offset + len(window):
            window, window_offset = _read(file, position, min(_DIRECTORY_WINDOW, end - position)), position
        signature, *sizes = _ENTRY.unpack_from(window, position - window_offset)
        if signature != b"PK\x01\x02":
            raise corrupt(file.path, f"its zip directory announces {count} records and does not hold them")
        position += _ENTRY.size + sum(sizes)
    if position != end:
        raise corrupt(file.path, f"its zip directory announces {size} bytes, and its records take {position - offset}")


def _read_record(file: StoredFile, info: zipfile.ZipInfo) -> ZipRecord:
    name = info.orig_filename
    if name != info.filename or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise _unsafe(file, f"a record with the name {name!r}, which leads outside or reads differently elsewhere")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _unsafe(file, f"a compressed record ({name!r}), which could unpack to any size")
    if info.volume:
        raise corrupt(file.path, f"its record {name!r} is said to be on another disk")
    if info.flag_bits & ~_PLAIN_FLAGS or info.external_attr & _IS_DIRECTORY or name.endswith("/"):
        raise corrupt(file.path, f"its record {name!r} is marked as encrypted, as a directory or as something else")
    if not 0 <= info.header_offset <= file.size - _LOCAL_HEADER.size:
        raise corrupt(file.path, f"its record {name!r} lies outside the file")
    header = _read(file, info.header_offset, _LOCAL_HEADER.size)
    signature, *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    offset = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if signature != _LOCAL_SIGNATURE or offset + info.file_size > file.size:
        raise corrupt(file.path, f"its record {name!r} reaches beyond the end or has no header")
    return ZipRecord(name, info.header_offset, offset, info.file_size, info.CRC)


def _unsafe(file: StoredFile, what: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{file.path} has {what}; torch.save never writes such a record. Nothing was loaded.", path=file.path
    )


def _read(file: StoredFile, offset: int, size: int) -> bytes:
    target = bytearray(size)
    file.read_into(offset, memoryview(target))
    return bytes(target)


class _Reader(io.RawIOBase):
    """A stored file as the file object that zipfile wants."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._file.size)[whence]
        if base + offset < 0:
            raise ValueError("a position before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        view = view[: max(0, self._file.size - self._position)]
        self._file.read_into(self._position, view)
        self._position += len(view)
        return len(view)
