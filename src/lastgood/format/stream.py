"""Writing a file image front to back: headers, data, checksums, directory, in one pass over the data."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lastgood.format.image import (
    Layout,
    Record,
    data_descriptor,
    directory,
    local_header,
    pack_trailer,
    plan_layout,
)
from lastgood.format.index import Index, encode_index
from lastgood.format.spec import BLOCK_SIZE, PAGE_ALIGNED_FROM, TORCH_FORMAT_VERSION, combine_crcs, crc32


class Extent(Protocol):
    """The bytes of one storage record, wherever they are."""

    @property
    def nbytes(self) -> int:
        """How many there are."""

    def copy_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on."""

    def to_bytes(self) -> bytes:
        """All bytes; asked for small extents only."""


class Pieces(Protocol):
    """Where the image goes: a window of memory that moves through the file."""

    def append(self, data: bytes) -> None:
        """Take over bytes that are at hand."""

    def window(self, limit: int) -> memoryview:
        """Between 1 and ``limit`` bytes of writable memory at the current position."""

    def advance(self, count: int) -> None:
        """The first ``count`` bytes of the window are filled."""


@dataclass(frozen=True)
class FileImage:
    """Everything that determines a checkpoint file's bytes but the tensor data's checksums."""

    layout: Layout
    index: Index
    index_bytes: bytes
    pickle_bytes: bytes
    extents: Sequence[Extent]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.layout.file_size


def make_image(index: Index, pickle_bytes: bytes, extents: Sequence[Extent]) -> FileImage:
    """Lay out a file from its index, its pickle and its storages."""
    index_bytes = encode_index(index)
    sizes = [entry.nbytes for entry in index.storages]
    layout = plan_layout(len(pickle_bytes), len(index.byteorder), sizes, len(index_bytes))
    return FileImage(layout, index, index_bytes, pickle_bytes, extents)


def native_byteorder() -> str:
    """``little`` or ``big``: tensor data is stored as it lies in memory."""
    return sys.byteorder


def stream_image(image: FileImage, pieces: Pieces) -> None:
    """Write the whole image into ``pieces``, computing the checksums on the way."""
    stream = _Stream(pieces)
    leading = (image.pickle_bytes, TORCH_FORMAT_VERSION, image.index.byteorder.encode())
    records = image.layout.records
    for record, data in zip(records[:3], leading, strict=True):
        stream.whole(record, data)
    for record, extent in zip(image.layout.storages, image.extents, strict=True):
        if record.size < PAGE_ALIGNED_FROM:
            stream.small(record, extent.to_bytes())
        else:
            stream.large(record, extent)
    stream.whole(image.layout.index, image.index_bytes)
    index_crc = stream.crcs[-1]
    block_table = encode_block_table(stream.block_crcs)
    stream.whole(image.layout.blocks, block_table)
    trailer = pack_trailer(image.layout, index_crc, stream.crcs[-1], image.index.save_id)
    stream.whole(image.layout.trailer, trailer)
    pieces.append(directory(image.layout, stream.crcs))


def encode_block_table(block_crcs: list[int]) -> bytes:
    """The data of the block record: each CRC-32 as four bytes, least significant first."""
    return b"".join(crc.to_bytes(4, "little") for crc in block_crcs)


_GATHERED_PARTS = 3 * 64
"""Small records are joined in memory 64 at a time, at most 4 MiB."""


class _Stream:
    """The position in a file being written, with the checksums so far."""

    def __init__(self, pieces: Pieces) -> None:
        self.crcs: list[int] = []
        self.block_crcs: list[int] = []
        self._pieces = pieces
        self._gathered: list[bytes] = []

    def small(self, record: Record, data: bytes) -> None:
        """A record of at most one block. There may be very many: they are passed on many at a time."""
        crc = crc32(data)
        self.crcs.append(crc)
        if data:
            self.block_crcs.append(crc)
        self._gathered += (local_header(record), data, data_descriptor(record, crc))
        if len(self._gathered) >= _GATHERED_PARTS:
            self.pass_on()

    def pass_on(self) -> None:
        """Hand over what has been gathered; whoever writes anything else calls this first."""
        self._pieces.append(b"".join(self._gathered))
        self._gathered.clear()

    def whole(self, record: Record, data: bytes) -> None:
        """A record of any size whose data is at hand as bytes."""
        blocks = [crc32(data[start : start + BLOCK_SIZE]) for start in range(0, len(data), BLOCK_SIZE)]
        crc = join_block_crcs(blocks, record.size)
        self._gathered += (local_header(record), data, data_descriptor(record, crc))
        self.pass_on()
        self._finish(crc, blocks)

    def large(self, record: Record, extent: Extent) -> None:
        """A record whose data is copied block by block: each block's CRC is taken while it is in the cache."""
        self.pass_on()
        pieces = self._pieces
        pieces.append(local_header(record))
        blocks: list[int] = []
        for start in range(0, record.size, BLOCK_SIZE):
            position, end, crc = start, min(start + BLOCK_SIZE, record.size), 0
            while position < end:
                window = pieces.window(end - position)
                extent.copy_into(position, window)
                crc = crc32(window, crc)
                pieces.advance(len(window))
                position += len(window)
            blocks.append(crc)
        crc = join_block_crcs(blocks, record.size)
        pieces.append(data_descriptor(record, crc))
        self._finish(crc, blocks)

    def _finish(self, crc: int, blocks: list[int]) -> None:
        self.crcs.append(crc)
        self.block_crcs += blocks


def join_block_crcs(block_crcs: Sequence[int], size: int) -> int:
    """The CRC-32 of a record of ``size`` bytes, from those of its blocks."""
    if not block_crcs:
        return 0
    crc = block_crcs[0]
    for number in range(1, len(block_crcs)):
        crc = combine_crcs(crc, block_crcs[number], min(BLOCK_SIZE, size - number * BLOCK_SIZE))
    return crc
