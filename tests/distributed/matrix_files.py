"""What the files of a checkpoint say of themselves, and damage to just one tensor."""

from collections import defaultdict
from pathlib import Path

import torch
from tests.unit.loading.files import archive_of, flip

from lastgood.format.mesh import Box
from lastgood.format.nodes import ShardedNode, TensorNode, walk_leaves
from lastgood.format.spec import DTYPES


def files_in(checkpoint: Path) -> list[Path]:
    """The files of all ranks."""
    found = sorted(checkpoint.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.partition("_")[2]))
    assert found
    return found


class Parts:
    """Which boxes of which sharded tensors are in which file, from the files' own indexes."""

    def __init__(self, checkpoint: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.itemsizes: dict[str, int] = {}
        self.boxes: dict[str, list[tuple[int, Box]]] = defaultdict(list)
        self.whole: list[set[str]] = []
        """For each file, the tensors in it that are in no way divided."""
        for rank, path in enumerate(files_in(checkpoint)):
            self.whole.append(set())
            with archive_of(path) as archive:
                for name, node in walk_leaves(archive.index.root):
                    if isinstance(node, ShardedNode):
                        self.shapes[name], self.itemsizes[name] = node.shape, DTYPES[node.dtype].itemsize
                        for offsets, part in zip(node.offsets, node.items, strict=True):
                            assert isinstance(part, TensorNode)
                            self.boxes[name].append((rank, Box(offsets, part.shape)))
                    elif isinstance(node, TensorNode):
                        self.whole[rank].add(name)
        self.ranks = range(len(self.whole))

    def assert_each_element_is_in_one_box(self) -> None:
        for name, shape in self.shapes.items():
            counts = torch.zeros(shape, dtype=torch.int64)
            for _, (offsets, sizes) in self.boxes[name]:
                region = counts[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
                region += 1
            assert bool((counts == 1).all()), f"{name} is in the boxes {self.boxes[name]}"

    def bytes_by_rank(self, name: str) -> list[int]:
        """How much of a tensor each file holds."""
        found = [0] * len(self.ranks)
        for rank, box in self.boxes[name]:
            found[rank] += box.element_count * self.itemsizes[name]
        return found


def flip_byte_of(path: Path, name: str) -> None:
    """Damage the last byte of the first part of a tensor that a file holds."""
    with archive_of(path) as archive:
        node = dict(walk_leaves(archive.index.root))[name]
        part = node.items[0] if isinstance(node, ShardedNode) else node
        assert isinstance(part, TensorNode)
        start = archive.layout.storages[part.storage].data_offset
        itemsize = DTYPES[part.dtype].itemsize
        last = part.offset + sum((size - 1) * step for size, step in zip(part.shape, part.stride, strict=True))
    flip(path, start + (last + 1) * itemsize - 1)
