"""Files that lastgood did not write: torch.save's zip archives, and the older format that torch.load still reads."""

from typing import Any

from lastgood._loading.legacy import check_legacy
from lastgood._loading.opaque_values import refuse_unsafe, safe_torch_load
from lastgood._loading.storages import MapLocation
from lastgood._loading.zip_directory import ZipRecord, is_zip, read_directory
from lastgood._loading.zip_records import damaged_records
from lastgood.errors import CorruptCheckpointError, corrupt
from lastgood.storage.base import StoredFile


def load_foreign(
    file: StoredFile, *, map_location: MapLocation, mmap: bool, check: bool, check_data: bool = True
) -> Any:
    """The value in a file of torch's, loaded without running anything from it.

    With ``check``, every record is first compared with the zip's own CRC-32; without ``check_data``, only those that
    hold no tensors. Files of torch's older format carry no checksums and are loaded as they are. Raises
    :class:`~lastgood.errors.UnsafeCheckpointError` before it loads anything that would run code or take memory that
    the file's size does not justify.
    """
    if not is_zip(file):
        check_legacy(file)
        return safe_torch_load(file.path, file.path, map_location=map_location)
    records = read_directory(file)
    if check:
        _check(file, [record for record in records.values() if check_data or "/data/" not in record.name])
    _check_pickle(file, records)
    return safe_torch_load(file.path, file.path, map_location=map_location, mmap=mmap)


def verify_foreign(file: StoredFile) -> None:
    """Compare every record of a zip archive with the zip's CRC-32; the older format carries none and passes."""
    if is_zip(file):
        _check(file, list(read_directory(file).values()))
    else:
        check_legacy(file)


def _check_pickle(file: StoredFile, records: dict[str, ZipRecord]) -> None:
    """Refuse a pickle that makes anything but values on the storages that the archive holds."""
    prefix = next(iter(records), "").partition("/")[0]
    record = records.get(f"{prefix}/data.pkl")
    if record is None:
        raise corrupt(file.path, "it is a zip archive without the record data.pkl, so no checkpoint")
    data = bytearray(record.size)
    file.read_into(record.offset, memoryview(data))

    def size_of(key: str) -> int | None:
        stored = records.get(f"{prefix}/data/{key}".lower())
        return stored.size if stored is not None else None

    refuse_unsafe(file.path, file.size, data, size_of)


def _check(file: StoredFile, records: list[ZipRecord]) -> None:
    for record in damaged_records(file, records, "read"):
        raise _wrong_crc(file, record)


def _wrong_crc(file: StoredFile, record: ZipRecord) -> CorruptCheckpointError:
    return corrupt(
        file.path,
        f"its record {record.name!r} does not match the zip's CRC-32 (a file saved under "
        "torch.serialization.set_crc32_options(False) has none; load such a file with verify=False)",
    )
