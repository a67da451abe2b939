"""Opening a file of ours: from its last bytes to its index, believing nothing that has not been checked."""

import sys
from array import array
from dataclasses import dataclass
from functools import cached_property

from lastgood.errors import corrupt
from lastgood.format.ending import Ending, find_ending
from lastgood.format.image import (
    Layout,
    Trailer,
    data_descriptor,
    directory,
    local_header,
    pack_trailer,
    plan_layout,
)
from lastgood.format.index import Index, InvalidIndexError, decode_index
from lastgood.format.nodes import Node, OpaqueNode, first_paths, walk_nodes
from lastgood.format.references import References
from lastgood.format.spec import STORAGE_RECORD_PREFIX, block_count, crc32
from lastgood.format.stream import join_block_crcs
from lastgood.storage.base import StoredFile


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
    def references(self) -> References:
        """What references in the index lead to."""
        return References(self.index.root)

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
        path = first_paths(self.index.root).get(storage)
        if path is not None:
            return f"the tensor at key {path!r} (record {name})", path
        return f"a value that only the pickle describes (record {name})", None


def open_archive(file: StoredFile) -> Archive | None:
    """The archive in ``file``, or ``None`` if lastgood did not write it.

    Checks everything that the index says against the file's size and the layout that follows from it. Raises
    :class:`~lastgood.errors.CorruptCheckpointError` for a file of ours that cannot be whole.
    """
    ending = find_ending(file)
    if ending is None:
        return None
    blocks_bytes = ending.read_blocks()
    index, layout = _read_index(file, ending)
    descriptor = data_descriptor(layout.trailer, crc32(ending.trailer_bytes))
    if ending.trailer_and_descriptor != ending.trailer_bytes + descriptor:
        raise corrupt(file.path, "its trailer does not match its checksum")
    block_crcs = array("I", blocks_bytes)
    if sys.byteorder == "big":
        block_crcs.byteswap()
    return Archive(file, ending.trailer, ending.trailer_bytes, index, layout, block_crcs)


def _read_index(file: StoredFile, ending: Ending) -> tuple[Index, Layout]:
    trailer, index_bytes = ending.trailer, ending.read_index()
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
    found = (trailer.index_offset, trailer.blocks_offset, trailer.blocks_size, ending.trailer_offset, file.size)
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
    if ending.trailer_bytes != pack_trailer(layout, trailer.index_crc, trailer.blocks_crc, index.save_id):
        raise corrupt(file.path, "its trailer is not as written")
    return index, layout
