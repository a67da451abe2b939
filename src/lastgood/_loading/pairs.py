"""Reading saved tensors into tensors that are there: straight into their memory where that will do, or by copies."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lastgood._loading.records import read_parts
from lastgood._loading.storages import StoragePool, byte_range, tensor_on
from lastgood._loading.targets import copy_into, in_pieces, split_targets
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.nodes import OpaqueNode, TensorNode
from lastgood.format.read_plan import DIRECT_FROM, Request
from lastgood.format.spec import BLOCK_SIZE
from lastgood.storage._direct_io import aligned_buffer, round_up

STAGED_BYTES = 16 * 1024 * 1024
"""Tensors that cannot be read straight into their targets pass through memory in pieces and batches of this size."""

_KEPT_BYTES = STAGED_BYTES + 2 * BLOCK_SIZE
"""With what a piece's first and last block hold beside it."""

_SMALL_ALIGNMENT = 64


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
    """Fill the targets that need a copy (on a device, of other strides), in their order, in batches of bounded size."""
    batch = _Batch(archive, check)
    for tensor, node in staged:
        if isinstance(node, OpaqueNode):
            batch.load()
            copy_into(tensor, opaque(node))
        else:
            for piece, piece_node in in_pieces(tensor, node, STAGED_BYTES):
                batch.add(piece, piece_node)
    batch.load()


class _Piece(NamedTuple):
    """A target, what is saved for it, which bytes of its storage are read, and where in the batch's memory they go."""

    target: torch.Tensor
    node: TensorNode
    start: int
    end: int
    place: int


class _Batch:
    """Pieces that are read into memory together and copied from there, batch after batch.

    All batches use the same memory: to touch new pages takes longer than to read into them.
    """

    def __init__(self, archive: Archive, check: bool) -> None:
        self._archive = archive
        self._check = check
        self._pieces: list[_Piece] = []
        self._size = 0
        self._kept: torch.UntypedStorage | None = None

    def add(self, target: torch.Tensor, node: TensorNode) -> None:
        """Load a piece with this batch, or with the next one if this is full."""
        start, end = self._range_of(node)
        size = _place_size(end - start)
        if self._size + size > STAGED_BYTES:
            self.load()
        self._pieces.append(_Piece(target, node, start, end, self._size))
        self._size += size

    def load(self) -> None:
        """Read and copy what there is, and begin a new batch."""
        if not self._pieces:
            return
        memory = self._memory()
        base = memory.data_ptr()
        requests = [
            Request(FIRST_STORAGE + piece.node.storage, piece.start, piece.end, base + piece.place)
            for piece in self._pieces
        ]
        read_parts(self._archive, requests, check=self._check, owner=memory)
        for piece in self._pieces:
            copy_into(piece.target, tensor_on(memory, piece.start - piece.place, piece.node))
        self._pieces, self._size = [], 0

    def _range_of(self, node: TensorNode) -> tuple[int, int]:
        """Which bytes of its storage to read; of large ones that are checked whole blocks, for they are read anyway."""
        start, end = byte_range(node)
        if not self._check or end - start < BLOCK_SIZE:
            return start, end
        record = self._archive.layout.records[FIRST_STORAGE + node.storage]
        return start - start % BLOCK_SIZE, min(end + -end % BLOCK_SIZE, record.size)

    def _memory(self) -> torch.UntypedStorage:
        if self._size > _KEPT_BYTES:
            return _new_memory(self._size)  # a target that cannot be divided: not to be kept for the others
        if self._kept is None:
            self._kept = _new_memory(_KEPT_BYTES)
        return self._kept


def _place_size(size: int) -> int:
    """Large ones are read straight to their place, which then has to begin with a page."""
    return round_up(size) if size >= DIRECT_FROM else size + -size % _SMALL_ALIGNMENT


def _new_memory(size: int) -> torch.UntypedStorage:
    return torch.frombuffer(aligned_buffer(size), dtype=torch.uint8).untyped_storage()
