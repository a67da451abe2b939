"""Reading an archive's bytes into memory: large parallel reads, each block checked right after it has come in."""

from collections.abc import Collection, Mapping, Sequence

from lastgood import _events
from lastgood._memory import address_of, copy_memory, memory_at
from lastgood._threads import call_with_timeout, run_all
from lastgood.errors import CorruptCheckpointError, StorageError, corrupt
from lastgood.format.archive import Archive, open_archive
from lastgood.format.index import InvalidIndexError
from lastgood.format.pickle_writer import encode_pickle
from lastgood.format.read_plan import (
    DirectRead,
    Part,
    Read,
    Request,
    ScatterRead,
    WholeRead,
    plan_parts,
    plan_whole,
)
from lastgood.format.spec import BLOCK_SIZE, crc32
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.base import StoredFile

READER_THREADS = 4
"""More than there are cores: while one waits for the device, another copies and checks."""

_SMALL_FILE = 64 * 1024 * 1024
_SMALL_FILE_THREADS = 2
NO_PROGRESS_TIMEOUT_SECS = 600.0


def no_data(path: str) -> StorageError:
    """The error for a file whose storage does not answer."""
    return StorageError(
        f"storage gave no data for {NO_PROGRESS_TIMEOUT_SECS:g} s while {path} was being read; nothing was changed "
        "on disk. Look at the file system, then load again.",
        path=path,
        phase="read",
    )


def open_in_time(file: StoredFile) -> Archive | None:
    """:func:`~lastgood.format.archive.open_archive` of a file whose reads nobody else watches over."""
    return call_with_timeout(
        lambda: open_archive(file), NO_PROGRESS_TIMEOUT_SECS, lambda: no_data(file.path), name="open"
    )


def read_parts(archive: Archive, requests: Sequence[Request], *, check: bool, owner: object) -> None:
    """Bring the requested bytes into memory; with ``check``, every block they lie in is compared with its checksum.

    ``owner`` keeps that memory alive for as long as a read goes on that a time-out or an interrupt has left behind.
    Raises :class:`~lastgood.errors.CorruptCheckpointError` naming the damaged tensor.
    """
    _execute(archive, plan_parts(archive.layout, requests, check=check), {}, check=check, owner=owner)


def read_whole(archive: Archive, requests: Sequence[Request], *, owner: object = None) -> None:
    """Bring the requested bytes into memory, of which ``owner`` is the owner, checking every byte of the file.

    What lies outside the records must be what their checksums and the layout predict, and the pickle must be the
    one that follows from the index.
    """
    records = archive.layout.records
    addresses = {}
    others = []
    for request in requests:
        if request.start == 0 and request.end == records[request.record].size:
            addresses[request.record] = request.address
        else:
            others.append(request)
    _read_and_check(archive, addresses, (), owner)
    read_parts(archive, others, check=True, owner=owner)


def check_rest(archive: Archive, done: Collection[int]) -> None:
    """Check every byte of the file, as :func:`read_whole` does, but the data of the records in ``done``.

    For a file of which a part has been read and checked already; small records are read once more all the same.
    """
    _read_and_check(archive, {}, done, None)


def _read_and_check(archive: Archive, addresses: dict[int, int], done: Collection[int], owner: object) -> None:
    pickle_view = memoryview(bytearray(archive.index.pickle_size))
    addresses[0] = address_of(pickle_view)
    reads = plan_whole(archive.layout, addresses, done)
    _execute(archive, reads, addresses, check=True, owner=(owner, pickle_view))
    check_pickle(archive, pickle_view)


def check_pickle(archive: Archive, pickle_bytes: memoryview) -> None:
    """Raise :class:`~lastgood.errors.CorruptCheckpointError` unless the pickle says just what the index says."""
    opaque = archive.opaque_nodes
    bodies = b"".join(pickle_bytes[node.start : node.start + node.length] for node in opaque)
    try:
        expected = encode_pickle(archive.index, bodies, opaque)
    except InvalidIndexError as error:
        raise corrupt(archive.file.path, f"its index has no pickle: {error}") from error
    if expected != pickle_bytes:
        raise corrupt(archive.file.path, "its index and its data.pkl describe different states")


def _execute(archive: Archive, reads: list[Read], addresses: Mapping[int, int], *, check: bool, owner: object) -> None:
    meter = _events.ByteMeter("read", archive.file.path, sum(read.size for read in reads))

    def execute(read: Read, owner: object = owner) -> None:
        if isinstance(read, DirectRead):
            _read_direct(archive, read, check=check)
        elif isinstance(read, ScatterRead):
            _read_and_scatter(archive, read, check=check)
        else:
            _read_records(archive, read, addresses)
        meter.add(read.size)

    threads = READER_THREADS if archive.file.size > _SMALL_FILE else _SMALL_FILE_THREADS
    run_all(reads, execute, threads, NO_PROGRESS_TIMEOUT_SECS, lambda: no_data(archive.file.path), name="read")


def _read_direct(archive: Archive, read: DirectRead, *, check: bool) -> None:
    view = memory_at(read.part.address, read.size)
    archive.file.read_into(read.offset, view)
    if check:
        _check_part(archive, read.part, view)


def _read_and_scatter(archive: Archive, read: ScatterRead, *, check: bool) -> None:
    scratch = aligned_buffer(read.size)
    archive.file.read_into(read.offset, scratch)
    base = address_of(scratch)
    for part in read.parts:
        start = archive.layout.records[part.record].data_offset + part.start - read.offset
        if check:
            _check_part(archive, part, scratch[start : start + part.end - part.start])
        if part.address:
            copied = start + part.copy_start - part.start
            copy_memory(part.address, base + copied, part.copy_end - part.copy_start)


def _read_records(archive: Archive, read: WholeRead, addresses: Mapping[int, int]) -> None:
    """Check and copy many small records at once, and compare all that stands between them."""
    scratch = aligned_buffer(read.size)
    archive.file.read_into(read.offset, scratch)
    base = address_of(scratch)
    layout = archive.layout
    expected: list[bytes | memoryview] = []
    for number in range(read.first, read.last):
        record = layout.records[number]
        start = record.data_offset - read.offset
        data = scratch[start : start + record.size]
        expected += (archive.outside_bytes(number), data)
        if crc32(data) != archive.record_crcs[number]:
            raise _damaged(archive, number, 0, record.size)
        address = addresses.get(number)
        if address:
            copy_memory(address, base + start, record.size)
    if read.offset + read.size == layout.outside_span(read.last)[1]:
        expected.append(archive.outside_bytes(read.last))
    if b"".join(expected) != scratch:
        raise corrupt(
            archive.file.path,
            f"the zip structure in the bytes {read.offset} to {read.offset + read.size} is not as written",
        )


def _check_part(archive: Archive, part: Part, data: memoryview) -> None:
    """Parts that are checked begin at a block's start and end at a block's or the record's end."""
    number = archive.first_blocks[part.record] + part.start // BLOCK_SIZE
    for start in range(0, len(data), BLOCK_SIZE):
        if crc32(data[start : start + BLOCK_SIZE]) != archive.block_crcs[number]:
            raise _damaged(archive, part.record, part.start + start, part.start + start + BLOCK_SIZE)
        number += 1


def _damaged(archive: Archive, number: int, start: int, end: int) -> CorruptCheckpointError:
    what, tensor = archive.describe_record(number)
    base = archive.layout.records[number].data_offset
    return corrupt(
        archive.file.path,
        f"{what} does not match its checksum between the bytes {base + start} and {base + end} of the file",
        tensor=tensor,
    )
