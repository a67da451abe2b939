"""Opening a file of ours: from its last bytes to its index, believing nothing that has not been checked."""

import sys
from array import array
from dataclasses import dataclass
from functools import cached_property

from lastgood.errors import CorruptCheckpointError
from lastgood.format.image import (
    END_SIZE,
    TRAILER_DISTANCE,
    Layout,
    Trailer,
    data_descriptor,
    directory,
    local_header,
    parse_end,
    parse_trailer,
    plan_layout,
)
from lastgood.format.index import (
    Index,
    InvalidIndexError,
    Node,
    OpaqueNode,
    TensorNode,
    decode_index,
    walk_nodes,
    walk_paths,
)
from lastgood.format.spec import FORMAT_VERSION, INDEX_RECORD, STORAGE_RECORD_PREFIX, block_count, crc32
from lastgood.format.stream import join_block_crcs
from lastgood.storage.base import StoredFile

_TAIL_SIZE = 64 * 1024


@dataclass(frozen=True)
class Archive:
    """An open file of ours, its index checked; the data of its tensors is not read yet."""

    file: StoredFile
    trailer: Trailer
    trailer_bytes: bytes
    index: Index
    layout: Layout
    block_crcs: "array[int]"

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes of the index, a container before what it holds."""
        return [node for node, _ in walk_nodes(self.index.root)]

    @cached_property
    def opaque_nodes(self) -> list[OpaqueNode]:
        """The nodes whose values only the pickle describes, in the order of their bodies there."""
        return [node for node in self.nodes if isinstance(node, OpaqueNode)]

    @cached_property
    def first_blocks(self) -> list[int]:
        """For each record that the block table covers: the number of its first block there."""
        numbers, total = [], 0
        for record in self.layout.checked:
            numbers.append(total)
            total += block_count(record.size)
        return numbers

    @cached_property
    def record_crcs(self) -> list[int]:
        """The CRC-32 of each record, joined from those of its blocks."""
        crcs = []
        for record, first in zip(self.layout.checked, self.first_blocks, strict=True):
            crcs.append(join_block_crcs(self.block_crcs[first : first + block_count(record.size)], record.size))
        return [*crcs, self.trailer.blocks_crc, crc32(self.trailer_bytes)]

    def outside_bytes(self, number: int) -> bytes:
        """What must stand in ``layout.outside_span(number)``."""
        records = self.layout.records
        if number == len(records):
            return self._ending
        before = data_descriptor(records[number - 1], self.record_crcs[number - 1]) if number else b""
        return before + local_header(records[number])

    @cached_property
    def _ending(self) -> bytes:
        descriptor = data_descriptor(self.layout.trailer, self.record_crcs[-1])
        return descriptor + directory(self.layout, self.record_crcs)

    def describe_record(self, number: int) -> tuple[str, str | None]:
        """What a record is, for an error message, and the key path of the first tensor in it, if it holds one."""
        name = self.layout.records[number].name
        if not name.startswith(STORAGE_RECORD_PREFIX):
            return f"the record {name}", None
        storage = int(name.removeprefix(STORAGE_RECORD_PREFIX))
        for path, node in walk_paths(self.index.root):
            if isinstance(node, TensorNode) and node.storage == storage:
                return f"the tensor at key {path!r} (record {name})", path
        return f"a value that only the pickle describes (record {name})", None


def corrupt(path: str, what: str, *, tensor: str | None = None) -> CorruptCheckpointError:
    """The error for a damaged file, in the words that all of them share."""
    return CorruptCheckpointError(
        f"{path} is damaged: {what}. Nothing from it should be used; load an earlier checkpoint or another copy.",
        path=path,
        tensor=tensor,
    )


def open_archive(file: StoredFile) -> Archive | None:
    """The archive in ``file``, or ``None`` if lastgood did not write it.

    Checks everything that the index says against the file's size and the layout that follows from it. Raises
    :class:`~lastgood.errors.CorruptCheckpointError` for a file of ours that cannot be whole.
    """
    if file.size < END_SIZE + TRAILER_DISTANCE:
        return None
    tail_offset = max(0, file.size - _TAIL_SIZE)
    tail = _read(file, tail_offset, file.size - tail_offset)
    directory_offset = parse_end(tail[-END_SIZE:], file.size)
    if directory_offset is None:
        return None

    def fetch(offset: int, size: int) -> bytes:
        if offset >= tail_offset:
            return tail[offset - tail_offset : offset - tail_offset + size]
        return _read(file, offset, size)

    trailer_offset = directory_offset - TRAILER_DISTANCE
    trailer_and_crc = fetch(trailer_offset, TRAILER_DISTANCE)
    trailer = parse_trailer(trailer_and_crc)
    if trailer is None:
        return None
    _check_trailer(file, trailer, trailer_offset)
    index_bytes = fetch(trailer.index_offset, trailer.index_size)
    blocks_bytes = fetch(trailer.blocks_offset, trailer.blocks_size)
    if crc32(index_bytes) != trailer.index_crc:
        raise corrupt(file.path, f"the record {INDEX_RECORD} does not match its checksum")
    if crc32(blocks_bytes) != trailer.blocks_crc:
        raise corrupt(file.path, "the table of block checksums does not match its own checksum")
    index, layout = _read_index(file, trailer, index_bytes, trailer_offset)
    trailer_bytes = trailer_and_crc[: layout.trailer.size]
    if trailer_and_crc[layout.trailer.size :] != data_descriptor(layout.trailer, crc32(trailer_bytes)):
        raise corrupt(file.path, "its trailer does not match its checksum")
    block_crcs = array("I", blocks_bytes)
    if sys.byteorder == "big":
        block_crcs.byteswap()
    return Archive(file, trailer, trailer_bytes, index, layout, block_crcs)


def _check_trailer(file: StoredFile, trailer: Trailer, trailer_offset: int) -> None:
    if trailer.format_version > FORMAT_VERSION:
        raise corrupt(
            file.path,
            f"its trailer asks for format version {trailer.format_version}, this lastgood reads up to {FORMAT_VERSION} "
            "(if a newer lastgood wrote it, it is not damaged: update lastgood)",
        )
    if not 0 < trailer.index_offset <= trailer.index_offset + trailer.index_size < trailer.blocks_offset:
        raise corrupt(file.path, "its trailer places the index where it cannot be")
    if trailer.blocks_offset + trailer.blocks_size > trailer_offset or trailer.blocks_size % 4:
        raise corrupt(file.path, "its trailer places the block table where it cannot be")


def _read_index(file: StoredFile, trailer: Trailer, index_bytes: bytes, trailer_offset: int) -> tuple[Index, Layout]:
    try:
        index = decode_index(index_bytes)
    except InvalidIndexError as error:
        raise corrupt(file.path, f"its index cannot be right: {error}") from error
    if index.byteorder not in ("little", "big"):
        raise corrupt(file.path, f"its index names the byte order {index.byteorder!r}")
    sizes = [entry.nbytes for entry in index.storages]
    # Bounds the layout's arithmetic and lists before they are made.
    if sum(sizes) + index.pickle_size > file.size:
        raise corrupt(file.path, "its index describes more data than the file holds")
    layout = plan_layout(index.pickle_size, len(index.byteorder), sizes, len(index_bytes))
    found = (trailer.index_offset, trailer.blocks_offset, trailer.blocks_size, trailer_offset, file.size)
    expected = (
        layout.index.data_offset,
        layout.blocks.data_offset,
        layout.blocks.size,
        layout.trailer.data_offset,
        layout.file_size,
    )
    if found != expected:
        raise corrupt(file.path, "its records do not stand where its index says")
    if trailer.save_id != index.save_id:
        raise corrupt(file.path, "its trailer and its index belong to different saves")
    return index, layout


def _read(file: StoredFile, offset: int, size: int) -> bytes:
    target = bytearray(size)
    file.read_into(offset, memoryview(target))
    return bytes(target)
