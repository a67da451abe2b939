"""Comparing the records of a zip archive that torch wrote with the CRC-32 that its directory gives for each."""

from collections.abc import Iterator, Sequence

from lastgood import _events
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, READER_THREADS, no_data
from lastgood._loading.zip_directory import ZipRecord
from lastgood._threads import run_all
from lastgood.format.read_plan import PIECE_SIZE
from lastgood.format.spec import combine_crcs, crc32
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.base import StoredFile

_MOST_IN_BATCH = 500


def damaged_records(file: StoredFile, records: Sequence[ZipRecord], phase: str) -> list[ZipRecord]:
    """Those whose bytes have another checksum, in the order of ``records``; ``phase`` names it for those who watch."""
    pieces = [
        (number, start, min(PIECE_SIZE, record.size - start))
        for number, record in enumerate(records)
        for start in range(0, record.size, PIECE_SIZE)
    ]
    meter = _events.ByteMeter(phase, file.path, sum(record.size for record in records))
    found: dict[tuple[int, int], int] = {}

    def read(batch: list[tuple[int, int, int]]) -> None:
        for number, start, size in batch:
            buffer = aligned_buffer(size)
            file.read_into(records[number].offset + start, buffer)
            found[number, start] = crc32(buffer)
            meter.add(size)

    batches = list(_batches(pieces))
    run_all(batches, read, READER_THREADS, NO_PROGRESS_TIMEOUT_SECS, lambda: no_data(file.path), name=phase)
    crcs = [0] * len(records)
    for number, start, size in pieces:
        crcs[number] = combine_crcs(crcs[number], found[number, start], size)
    return [record for record, crc in zip(records, crcs, strict=True) if crc != record.crc]


def _batches(pieces: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Small pieces, of which there may be very many, a few hundred at a time."""
    batch: list[tuple[int, int, int]] = []
    nbytes = 0
    for piece in pieces:
        batch.append(piece)
        nbytes += piece[2]
        if nbytes >= PIECE_SIZE or len(batch) >= _MOST_IN_BATCH:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
