"""Reading an archive's bytes into memory: large parallel reads, each block checked right after it has come in."""

from collections.abc import Sequence

from lastgood._memory import address_of, copy_memory, memory_at
from lastgood._threads import run_all
from lastgood.errors import CorruptCheckpointError, StorageError
from lastgood.format.archive import Archive, corrupt
from lastgood.format.index import InvalidIndexError, OpaqueNode, walk_nodes
from lastgood.format.pickle_writer import encode_pickle
from lastgood.format.read_plan import Outside, Part, Request, Run, plan_parts, plan_whole
from lastgood.format.spec import BLOCK_SIZE, crc32
from lastgood.storage._direct_io import aligned_buffer

READER_THREADS = 4
NO_PROGRESS_TIMEOUT_SECS = 600.0


def read_parts(archive: Archive, requests: Sequence[Request], *, check: bool) -> None:
    """Bring the requested bytes into memory; with ``check``, every block they lie in is compared with its checksum.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` naming the damaged tensor.
    """
    _execute(archive, plan_parts(archive.layout, requests, check=check), check=check)


def read_whole(archive: Archive, requests: Sequence[Request]) -> None:
    """Bring the requested records into memory, checking every byte of the file on the way.

    What lies outside the records must be what their checksums and the layout predict, and the pickle must be the
    one that follows from the index.
    """
    pickle_size = archive.index.pickle_size
    pickle_bytes = bytearray(pickle_size)
    view = memoryview(pickle_bytes)
    pickle_request = Request(0, 0, pickle_size, address_of(view))
    _execute(archive, plan_whole(archive.layout, [pickle_request, *requests]), check=True)
    check_pickle(archive, view)


def check_pickle(archive: Archive, pickle_bytes: memoryview) -> None:
    """Raise :class:`~lastgood.errors.CorruptCheckpointError` unless the pickle says just what the index says."""
    index = archive.index
    opaque = [node for node, _ in walk_nodes(index.root) if isinstance(node, OpaqueNode)]
    bodies = b"".join(pickle_bytes[node.start : node.start + node.length] for node in opaque)
    try:
        expected = encode_pickle(index, bodies)
    except InvalidIndexError as error:
        raise corrupt(archive.file.path, f"its index has no pickle: {error}") from error
    if expected != pickle_bytes:
        raise corrupt(archive.file.path, "its index and its data.pkl describe different states")


def _execute(archive: Archive, runs: list[Run], *, check: bool) -> None:
    def timed_out() -> StorageError:
        path = archive.file.path
        return StorageError(
            f"storage gave no data for {NO_PROGRESS_TIMEOUT_SECS:g} s while {path} was being read; nothing was changed "
            "on disk. Look at the file system, then load again.",
            path=path,
            phase="read",
        )

    def run(task: Run) -> None:
        _execute_run(archive, task, check=check)

    if len(runs) == 1:
        run(runs[0])
    elif runs:
        run_all(runs, run, READER_THREADS, NO_PROGRESS_TIMEOUT_SECS, timed_out, name="read")


def _execute_run(archive: Archive, run: Run, *, check: bool) -> None:
    if run.direct:
        part = run.parts[0]
        view = memory_at(part.address, run.size)  # type: ignore[union-attr]
        archive.file.read_into(run.offset, view)
        if check:
            _check_part(archive, part, view)  # type: ignore[arg-type]
        return
    scratch = aligned_buffer(run.size)
    archive.file.read_into(run.offset, scratch)
    base = address_of(scratch)
    records = archive.layout.records
    for item in run.parts:
        if isinstance(item, Outside):
            _check_outside(archive, item, scratch[item.start - run.offset : item.end - run.offset])
            continue
        start = records[item.record].data_offset + item.start - run.offset
        if check:
            _check_part(archive, item, scratch[start : start + item.end - item.start])
        if item.address:
            copied = start + item.copy_start - item.start
            copy_memory(item.address, base + copied, item.copy_end - item.copy_start)


def _check_part(archive: Archive, part: Part, data: memoryview) -> None:
    """Parts that are checked begin at a block's start and end at a block's or the record's end."""
    number = archive.first_blocks[part.record] + part.start // BLOCK_SIZE
    for start in range(0, len(data), BLOCK_SIZE):
        if crc32(data[start : start + BLOCK_SIZE]) != archive.block_crcs[number]:
            what, tensor = archive.describe_record(part.record)
            where = archive.layout.records[part.record].data_offset + part.start + start
            raise corrupt(
                archive.file.path,
                f"{what} does not match its checksum between the bytes {where} and {where + BLOCK_SIZE} of the file",
                tensor=tensor,
            )
        number += 1


def _check_outside(archive: Archive, item: Outside, found: memoryview) -> None:
    start, _ = archive.layout.outside_span(item.number)
    expected = archive.outside_bytes(item.number)[item.start - start : item.end - start]
    if found != expected:
        raise corrupt(
            archive.file.path, f"the zip structure between the bytes {item.start} and {item.end} is not as written"
        )


def with_undefined_targets(error: CorruptCheckpointError, targets: Sequence[str]) -> CorruptCheckpointError:
    """The same error, saying which in-place targets may hold partly read data."""
    if not targets:
        return error
    shown = ", ".join(targets[:5]) + (f" and {len(targets) - 5} more" if len(targets) > 5 else "")
    return CorruptCheckpointError(
        f"{error} These targets may hold partly read data and must be loaded again before use: {shown}.",
        undefined_targets=tuple(targets),
        path=error.path,
        tensor=error.tensor,
    )
