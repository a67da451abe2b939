"""A file image that lies whole in memory: laying down what is known before the data, and finishing it after.

Whoever stages a snapshot lays down the headers and the pickle; storages are copied to their places; whoever writes the
file adds what follows from the data: descriptors with checksums, index, block table, trailer, directory.
"""

from collections.abc import Callable, Iterator

from lastgood.format.image import (
    FIRST_STORAGE,
    DataLayout,
    Layout,
    Record,
    data_descriptor,
    directory,
    local_header,
    pack_trailer,
)
from lastgood.format.index_head import IndexHead, join_index
from lastgood.format.spec import BLOCK_SIZE, TORCH_FORMAT_VERSION, crc32
from lastgood.format.stream import encode_block_table, join_block_crcs


def lay_down(memory: memoryview, data: DataLayout, pickle_bytes: bytes, byteorder: str) -> None:
    """Write everything before the index that does not depend on the storages' bytes."""
    leading = (pickle_bytes, TORCH_FORMAT_VERSION, byteorder.encode())
    for record in data.records:
        memory[record.header_offset : record.data_offset] = local_header(record)
    for record, content in zip(data.records[:FIRST_STORAGE], leading, strict=True):
        memory[record.data_offset : record.data_end] = content


def finish(
    memory: memoryview, layout: Layout, head: IndexHead, index_body: memoryview, wait_for: Callable[[int], None]
) -> Iterator[int]:
    """Turn an image into a file, front to back; yields up to where the bytes are final, again and again.

    ``wait_for(end)`` is called before bytes up to ``end`` are looked at, and returns once they are there.
    """
    crcs: list[int] = []
    block_crcs: list[int] = []
    for record in layout.records[: -len(layout.ending)]:
        if record.size <= BLOCK_SIZE:
            wait_for(record.data_end)
            crc = crc32(memory[record.data_offset : record.data_end])
            if record.size:
                block_crcs.append(crc)
        else:
            blocks: list[int] = []
            yield from _finish_blocks(memory, record, blocks, wait_for)
            crc = join_block_crcs(blocks, record.size)
            block_crcs += blocks
        memory[record.data_end : record.end] = data_descriptor(record, crc)
        crcs.append(crc)
        yield record.end
    _finish_ending(memory, layout, head, index_body, crcs, block_crcs)
    yield layout.file_size


def _finish_blocks(
    memory: memoryview, record: Record, blocks: list[int], wait_for: Callable[[int], None]
) -> Iterator[int]:
    for start in range(record.data_offset, record.data_end, BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, record.data_end)
        wait_for(end)
        blocks.append(crc32(memory[start:end]))
        yield end


def _finish_ending(
    memory: memoryview, layout: Layout, head: IndexHead, index_body: memoryview, crcs: list[int], block_crcs: list[int]
) -> None:
    index_bytes = join_index(head, index_body)
    index_crc = _put(memory, layout.index, index_bytes, crcs, block_crcs)
    blocks_crc = _put(memory, layout.blocks, encode_block_table(block_crcs), crcs, [])
    _put(memory, layout.trailer, pack_trailer(layout, index_crc, blocks_crc, head.save_id), crcs, [])
    memory[layout.directory_offset : layout.file_size] = directory(layout, crcs)


def _put(memory: memoryview, record: Record, content: bytes, crcs: list[int], block_crcs: list[int]) -> int:
    """Write a record whose bytes are at hand; notes its checksums and returns that of the whole."""
    blocks = [crc32(content[start : start + BLOCK_SIZE]) for start in range(0, record.size, BLOCK_SIZE)]
    crc = join_block_crcs(blocks, record.size)
    memory[record.header_offset : record.end] = b"".join((local_header(record), content, data_descriptor(record, crc)))
    block_crcs += blocks
    crcs.append(crc)
    return crc
