"""Checking every byte of one file: it does not stop at the first damage, so that all damaged tensors are named."""

from dataclasses import dataclass, field

from lastgood import _events
from lastgood._contents.model import Problem, VerifyReport
from lastgood._contents.torch_files import describe_torch_file, describe_zip
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, READER_THREADS, check_pickle, no_data
from lastgood._loading.zip_directory import is_zip, read_directory
from lastgood._loading.zip_records import damaged_records
from lastgood._threads import run_all
from lastgood.errors import CorruptCheckpointError, UnsafeCheckpointError
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.nodes import first_paths
from lastgood.format.read_plan import DirectRead, Read, WholeRead, plan_whole
from lastgood.format.spec import BLOCK_SIZE, block_count, crc32
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.base import StoredFile


@dataclass
class Findings:
    """What has been found so far, from any thread."""

    path: str
    files: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def wrong(self, file: str, message: str, tensor: str | None = None) -> None:
        self.problems.append(Problem(file, tensor, message))

    def report(self) -> VerifyReport:
        return VerifyReport(self.path, self.files, self.nbytes, tuple(self.problems), tuple(self.notes))


def verify_archive(archive: Archive, findings: Findings) -> None:
    """Check a file of ours: every block, every byte outside the records, and that index and pickle agree."""
    _ArchiveCheck(archive, findings).run()


class _ArchiveCheck:
    def __init__(self, archive: Archive, findings: Findings) -> None:
        self._archive = archive
        self._findings = findings
        self._meter = _events.ByteMeter("verify", archive.file.path, archive.file.size)
        self._pickle = memoryview(bytearray(archive.index.pickle_size))
        # Filled from several threads, each item by one append.
        self._damaged_blocks: list[tuple[int, int]] = []
        self._damaged_structure: list[tuple[int, int]] = []

    def run(self) -> None:
        file = self._archive.file
        reads = plan_whole(self._archive.layout, {})
        run_all(reads, self._read, READER_THREADS, NO_PROGRESS_TIMEOUT_SECS, lambda: no_data(file.path), name="verify")
        self._report_blocks()
        for start, end in sorted(self._damaged_structure):
            self._findings.wrong(file.path, f"the zip structure in the bytes {start} to {end} is not as written")
        if not any(record == 0 for record, _ in self._damaged_blocks):
            try:
                check_pickle(self._archive, self._pickle)
            except CorruptCheckpointError as error:
                self._findings.wrong(file.path, str(error))

    def _read(self, read: Read) -> None:
        buffer = aligned_buffer(read.size)
        self._archive.file.read_into(read.offset, buffer)
        if isinstance(read, WholeRead):
            self._check_records(read, buffer)
        else:
            for part in [read.part] if isinstance(read, DirectRead) else read.parts:
                start = self._archive.layout.records[part.record].data_offset + part.start - read.offset
                self._check_blocks(part.record, part.start, buffer[start : start + part.end - part.start])
        self._meter.add(read.size)

    def _check_records(self, read: WholeRead, buffer: memoryview) -> None:
        layout, start = self._archive.layout, 0
        for number in range(read.first, read.last):
            start = self._check_outside(number, buffer, start)
            end = start + layout.records[number].size
            self._check_blocks(number, 0, buffer[start:end])
            start = end
        if start < len(buffer):
            self._check_outside(read.last, buffer, start)

    def _check_outside(self, number: int, buffer: memoryview, start: int) -> int:
        """Compare what stands between two records' data; returns where it ends in the buffer."""
        expected = self._archive.outside_bytes(number)
        end = start + len(expected)
        if buffer[start:end] != expected:
            self._damaged_structure.append(self._archive.layout.outside_span(number))
        return end

    def _check_blocks(self, number: int, start: int, data: memoryview) -> None:
        """``data`` begins at a block's start and ends at a block's or the record's end."""
        archive = self._archive
        if number >= len(archive.first_blocks):  # block table and trailer have checksums of their own
            if crc32(data) != archive.record_crcs[number]:
                self._damaged_blocks.append((number, 0))
            return
        if number == 0:
            self._pickle[start : start + len(data)] = data
        first = archive.first_blocks[number]
        for block in range(start // BLOCK_SIZE, start // BLOCK_SIZE + block_count(len(data))):
            at = block * BLOCK_SIZE - start
            if crc32(data[at : at + BLOCK_SIZE]) != archive.block_crcs[first + block]:
                self._damaged_blocks.append((number, block))

    def _report_blocks(self) -> None:
        archive = self._archive
        by_record: dict[int, list[int]] = {}
        for number, block in sorted(self._damaged_blocks):
            by_record.setdefault(number, []).append(block)
        paths = first_paths(archive.index.root) if by_record else {}
        for number, blocks in by_record.items():
            record = archive.layout.records[number]
            start = record.data_offset + blocks[0] * BLOCK_SIZE
            end = min(start + BLOCK_SIZE, record.data_end)
            path = paths.get(number - FIRST_STORAGE)
            what = f"the record {record.name}" if path is None else f"the tensor at key {path!r} (record {record.name})"
            how_many = f", nor do {len(blocks) - 1:,} more of its blocks" if len(blocks) > 1 else ""
            self._findings.wrong(
                archive.file.path,
                f"{what} does not match its checksum between the bytes {start} and {end} of the file{how_many}",
                path,
            )


def verify_torch_file(file: StoredFile, findings: Findings) -> None:
    """Check a file of torch's: every record of a zip, and that it holds what its pickle names."""
    if not is_zip(file):
        describe_torch_file(file)
        findings.notes.append(
            f"{file.path} is in torch's format before version 1.6, which carries no checksums: it is as long as it "
            "should be, and nothing more can be said"
        )
        return
    records = read_directory(file)
    damaged = damaged_records(file, list(records.values()), "verify")
    paths: dict[int, str] = {}
    places: dict[int, int] = {}
    try:
        contents = describe_zip(file, records)
    except UnsafeCheckpointError as error:
        findings.notes.append(str(error))
    except CorruptCheckpointError as error:
        if not any(record.name.endswith("/data.pkl") for record in damaged):
            findings.wrong(file.path, str(error))
    else:
        paths = first_paths(contents.root)
        places = {place.offset: number for number, place in enumerate(contents.places)}
    for record in damaged:
        path = paths.get(places.get(record.offset, -1))
        what = f"the record {record.name}" if path is None else f"the tensor at key {path!r} (record {record.name})"
        findings.wrong(
            file.path,
            f"{what} does not match the zip's CRC-32 (unless it was saved under "
            "torch.serialization.set_crc32_options(False): such a file has none)",
            path,
        )
