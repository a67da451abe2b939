"""Files that lastgood did not write: torch.save's zip archives, and the older formats that torch.load still reads."""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from lastgood._loading.opaque_values import safe_torch_load
from lastgood._loading.values import MapLocation
from lastgood._threads import run_all
from lastgood.errors import CorruptCheckpointError, StorageError, UnsafeCheckpointError
from lastgood.format.archive import corrupt
from lastgood.format.spec import LASTGOOD_DIRECTORY, combine_crcs, crc32
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.base import StoredFile

_PIECE_SIZE = 8 * 1024 * 1024
_READER_THREADS = 4
_TIMEOUT_SECS = 600.0
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


@dataclass(frozen=True)
class _Entry:
    name: str
    offset: int
    size: int
    crc: int


def load_foreign(file: StoredFile, *, map_location: MapLocation, mmap: bool, check: bool) -> Any:
    """The value in a file of torch's, loaded without running anything from it.

    With ``check``, every record is first compared with the zip's own CRC-32. Files of torch's older formats carry no
    checksums and are loaded as they are.
    """
    if not zipfile.is_zipfile(_Reader(file)):
        return safe_torch_load(file.path, file.path, map_location=map_location)
    entries = _entries(file)
    if check:
        _check(file, entries)
    return safe_torch_load(file.path, file.path, map_location=map_location, mmap=mmap)


def verify_foreign(file: StoredFile) -> None:
    """Compare every record of a zip archive with the zip's CRC-32; older formats carry none and pass."""
    if zipfile.is_zipfile(_Reader(file)):
        _check(file, _entries(file))


def _entries(file: StoredFile) -> list[_Entry]:
    """The archive's records, after making sure that they lie in the file, apart from each other, uncompressed."""
    try:
        with zipfile.ZipFile(_Reader(file)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error, UnicodeDecodeError, NotImplementedError) as error:
        raise corrupt(file.path, f"its zip directory cannot be read: {error}") from error
    if any(f"/{LASTGOOD_DIRECTORY}" in f"/{info.filename}" for info in infos):
        raise corrupt(file.path, "lastgood wrote it, but the trailer that leads to its index cannot be read")
    entries = [_entry(file, info) for info in infos]
    if len({entry.name for entry in entries}) != len(entries):
        raise corrupt(file.path, "two of its records have the same name")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < end:
            raise corrupt(file.path, f"its record {entry.name!r} overlaps the one before it")
        end = entry.offset + entry.size
    return entries


def _entry(file: StoredFile, info: zipfile.ZipInfo) -> _Entry:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise UnsafeCheckpointError(
            f"{file.path} has a compressed record ({info.filename!r}), which torch.save never writes and which could "
            "unpack to any size; nothing was loaded.",
            path=file.path,
        )
    if not 0 <= info.header_offset <= file.size - _LOCAL_HEADER.size:
        raise corrupt(file.path, f"its record {info.filename!r} lies outside the file")
    header = bytearray(_LOCAL_HEADER.size)
    file.read_into(info.header_offset, memoryview(header))
    signature, *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    offset = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if signature != b"PK\x03\x04" or offset + info.file_size > file.size:
        raise corrupt(file.path, f"its record {info.filename!r} reaches beyond the end or has no header")
    return _Entry(info.filename, offset, info.file_size, info.CRC)


def _check(file: StoredFile, entries: list[_Entry]) -> None:
    pieces = [
        (number, start, min(_PIECE_SIZE, entry.size - start))
        for number, entry in enumerate(entries)
        for start in range(0, entry.size, _PIECE_SIZE)
    ]
    found: dict[tuple[int, int], int] = {}

    def read(piece: tuple[int, int, int]) -> None:
        number, start, size = piece
        buffer = aligned_buffer(size)
        file.read_into(entries[number].offset + start, buffer)
        found[number, start] = crc32(buffer)

    def timed_out() -> StorageError:
        return StorageError(
            f"storage gave no data for {_TIMEOUT_SECS:g} s while {file.path} was being checked; nothing was loaded.",
            path=file.path,
            phase="read",
        )

    run_all(pieces, read, _READER_THREADS, _TIMEOUT_SECS, timed_out, name="check")
    crcs = [0] * len(entries)
    for number, start, size in pieces:
        crcs[number] = combine_crcs(crcs[number], found[number, start], size)
    for entry, crc in zip(entries, crcs, strict=True):
        if crc != entry.crc:
            raise _wrong_crc(file, entry)


def _wrong_crc(file: StoredFile, entry: _Entry) -> CorruptCheckpointError:
    return corrupt(
        file.path,
        f"its record {entry.name!r} does not match the zip's CRC-32 (a file saved under "
        "torch.serialization.set_crc32_options(False) has none; load such a file with verify=False)",
    )


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
