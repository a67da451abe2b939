"""Reading saved tensors into tensors that are there: straight into their memory where that will do, or by copies."""

from collections.abc import Sequence
from typing import Any

import torch

from lastgood._loading.records import read_parts
from lastgood._loading.targets import copy_into, in_pieces, split_targets
from lastgood._loading.values import StoragePool, byte_range
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.nodes import OpaqueNode, TensorNode
from lastgood.format.read_plan import Request

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
    batch: list[tuple[torch.Tensor, TensorNode]] = []
    size = 0
    for tensor, node in staged:
        if isinstance(node, OpaqueNode):
            copy_into(tensor, opaque(node))
            continue
        for piece, piece_node in in_pieces(tensor, node, STAGED_BYTES):
            start, end = byte_range(piece_node)
            if size + end - start > STAGED_BYTES:
                _load_batch(archive, batch, check=check)
                batch, size = [], 0
            batch.append((piece, piece_node))
            size += end - start
    _load_batch(archive, batch, check=check)


def _load_batch(archive: Archive, batch: list[tuple[torch.Tensor, TensorNode]], *, check: bool) -> None:
    requests: list[Request] = []
    pools = []
    for _, node in batch:
        pool = StoragePool(archive.index.storages, "cpu")
        requests += ask(pool, [node])
        pools.append(pool)
    read_parts(archive, requests, check=check, owner=pools)
    for (tensor, node), pool in zip(batch, pools, strict=True):
        copy_into(tensor, pool.tensor(node))
