"""Reading saved tensors into tensors that are there: straight into their memory where that will do, or by copies."""

from collections.abc import Sequence
from typing import Any

import torch

from lastgood._loading.records import read_parts
from lastgood._loading.targets import copy_into, in_pieces, split_targets
from lastgood._loading.values import StoragePool, byte_range, tensor_on
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.nodes import OpaqueNode, TensorNode
from lastgood.format.read_plan import Request
from lastgood.format.spec import BLOCK_SIZE
from lastgood.storage._direct_io import aligned_buffer, round_up

STAGED_BYTES = 16 * 1024 * 1024
"""Tensors that cannot be read straight into their targets pass through memory in batches of at most this size."""


class Pairs:
    """Targets and what is saved for them, sorted by how they are to be read."""

    def __init__(self, targets: Sequence[tuple[torch.Tensor, TensorNode | OpaqueNode]]) -> None:
        self._direct, self._staged = split_targets(targets)

    def requests(self) -> list[Request]:
        """What is to be read straight into targets, before :meth:`finish`."""
        requests = []
        for tensor, node in self._direct:
            start, end = byte_range(node)
            requests.append(Request(FIRST_STORAGE + node.storage, start, end, tensor.data_ptr()))
        return requests

    def finish(self, archive: Archive, opaque: Any, *, check: bool) -> None:
        """Once the requests are carried out: let autograd know, and fill the targets that need a copy."""
        _mark_changed([tensor for tensor, _ in self._direct])
        _load_staged(archive, self._staged, opaque, check=check)


def read_pairs(archive: Archive, targets: Sequence[tuple[torch.Tensor, TensorNode]], *, check: bool) -> None:
    """Read tensors of one file into their targets."""
    pairs = Pairs(targets)
    read_parts(archive, pairs.requests(), check=check, owner=targets)
    pairs.finish(archive, None, check=check)


def ask(pool: StoragePool, nodes: Sequence[Any]) -> list[Request]:
    """Make room in the pool for the tensors among these nodes; what must be read into it."""
    for node in nodes:
        if type(node) is TensorNode:
            pool.ask(node)
    return pool.allocate()


def _mark_changed(tensors: list[torch.Tensor]) -> None:
    """Let autograd know, as an in-place operation would."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _load_staged(
    archive: Archive, staged: list[tuple[torch.Tensor, TensorNode | OpaqueNode]], opaque: Any, *, check: bool
) -> None:
    """Fill the targets that need a copy (on a device, of other strides) through batches of bounded size."""
    scratch = _Scratch()
    batch: list[tuple[torch.Tensor, TensorNode]] = []
    size = 0
    for tensor, node in staged:
        if isinstance(node, OpaqueNode):
            copy_into(tensor, opaque(node))
            continue
        for piece, piece_node in in_pieces(tensor, node, STAGED_BYTES):
            needed = _room_for(_range_to_read(archive, piece_node))
            if size + needed > STAGED_BYTES:
                _load_batch(archive, batch, scratch.of(size), check=check)
                batch, size = [], 0
            batch.append((piece, piece_node))
            size += needed
    _load_batch(archive, batch, scratch.of(size), check=check)


class _Scratch:
    """Memory that one batch after the other passes through: to touch new pages each time takes longer than to read."""

    def __init__(self) -> None:
        self._storage = torch.empty(0, dtype=torch.uint8).untyped_storage()

    def of(self, size: int) -> torch.UntypedStorage:
        """At least ``size`` bytes; what was there before is lost."""
        if self._storage.nbytes() < size:
            self._storage = torch.frombuffer(aligned_buffer(size), dtype=torch.uint8).untyped_storage()
        return self._storage


def _range_to_read(archive: Archive, node: TensorNode) -> tuple[int, int]:
    """Where it lies in its storage, in bytes; if it is large, in whole blocks, as checksums are of those."""
    start, end = byte_range(node)
    if end - start < BLOCK_SIZE:
        return start, end
    record = archive.layout.records[FIRST_STORAGE + node.storage]
    return start - start % BLOCK_SIZE, min(end + -end % BLOCK_SIZE, record.size)


def _room_for(read: tuple[int, int]) -> int:
    return round_up(read[1] - read[0])


def _load_batch(
    archive: Archive, batch: list[tuple[torch.Tensor, TensorNode]], scratch: torch.UntypedStorage, *, check: bool
) -> None:
    requests: list[Request] = []
    values = []
    place = 0
    for _, node in batch:
        start, end = _range_to_read(archive, node)
        requests.append(Request(FIRST_STORAGE + node.storage, start, end, scratch.data_ptr() + place))
        values.append(tensor_on(scratch, start - place, node))
        place += _room_for((start, end))
    read_parts(archive, requests, check=check, owner=scratch)
    for (tensor, _), value in zip(batch, values, strict=True):
        copy_into(tensor, value)
