"""Tensors that are spread over ranks, where they were saved or where they are wanted: which part is read from where."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import torch

from lastgood._loading.pairs import read_pairs
from lastgood._loading.storages import (
    MapLocation,
    byte_range,
    contiguous_stride,
    is_meta,
    new_storage,
    relocated,
    torch_dtype,
    with_flags,
)
from lastgood._loading.targets import copy_into
from lastgood.errors import TargetMismatchError, UncommittedCheckpointError, UnsupportedStateError, corrupt
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.manifest import Manifest, ShardedTensor
from lastgood.format.mesh import Box, Layout, Mesh, Shape, whole
from lastgood.format.nodes import ShardedNode, TensorNode, parts_of, sharded_nodes
from lastgood.format.sharding import held_pieces, pieces_within
from lastgood.format.spec import BLOCK_SIZE, DTYPES
from lastgood.sharding.dtensors import is_dtensor, local_tensor, own_mesh, placements_of, require_usual_shards
from lastgood.sharding.local_shards import narrowed

_SHARED_FROM = 4
"""From so many ranks of a machine that read the same on, its page cache is faster (docs/performance.md)."""

SpreadTarget = tuple[str, torch.Tensor, TensorNode | ShardedNode]
"""A key path, the tensor to be filled, and how it was saved."""


class Part(msgspec.Struct, frozen=True):
    """A box of a saved tensor, and the tensor of one file that is just that box."""

    archive: Archive
    box: Box
    node: TensorNode


class Source(Protocol):
    """Where the parts of the tensors of one checkpoint are."""

    def find(self, node: TensorNode | ShardedNode, region: Box) -> list[Part]:
        """The parts that together are this region of the tensor that ``node`` describes."""

    def archives_for(self, targets: Sequence[SpreadTarget], fresh: Sequence[ShardedNode]) -> list[Archive]:
        """All files that will be read for these."""

    def verified_here(self) -> list[Archive]:
        """The files that this rank has to check every byte of, where all of a checkpoint is to be checked."""


class OneFile:
    """A file that stands for itself, although other ranks' may belong to it."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def find(self, node: TensorNode | ShardedNode, region: Box) -> list[Part]:
        if isinstance(node, TensorNode):
            return [Part(self._archive, region, _sub_node(node, region.offsets, region.sizes))]
        held = [
            Part(self._archive, box, _sub_node(part, _minus(box.offsets, there.offsets), box.sizes))
            for there, part in parts_of(node)
            if (box := there.intersection(region)) is not None
        ]
        if sum(part.box.element_count for part in held) != region.element_count:
            raise UncommittedCheckpointError(
                f"{self._archive.file.path} holds only a part of a tensor that is wanted, and no manifest "
                "says where the others are; nothing has been changed. Load an earlier checkpoint.",
                path=self._archive.file.path,
            )
        return held

    def archives_for(self, targets: Sequence[SpreadTarget], fresh: Sequence[ShardedNode]) -> list[Archive]:
        return [self._archive]

    def verified_here(self) -> list[Archive]:
        return [self._archive]


class ManyFiles:
    """The files of all ranks, as the manifest describes them; ``open_rank`` opens one that is not open yet.

    ``verified_ranks``: whose files :meth:`verified_here` gives.
    """

    def __init__(
        self,
        manifest: Manifest,
        primary: Archive,
        open_rank: Callable[[int], Archive],
        path: str,
        verified_ranks: Sequence[int],
    ) -> None:
        self._verified_ranks = verified_ranks
        self._manifest = manifest
        self._primary = primary
        self._open_rank = open_rank
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._layouts: dict[str, Layout] = {}
        self._parts_by_rank: dict[int, dict[str, ShardedNode]] = {}
        self._names = {id(node): name for name, node in sharded_nodes(primary.index.root)}

    def find(self, node: TensorNode | ShardedNode, region: Box) -> list[Part]:
        if isinstance(node, TensorNode):
            return OneFile(self._primary).find(node, region)
        name = self._names[id(node)]
        return [self._part(name, held.rank, held.box) for held in pieces_within(self._layout(name, node), region)]

    def archives_for(self, targets: Sequence[SpreadTarget], fresh: Sequence[ShardedNode]) -> list[Archive]:
        ranks: set[int] = set()
        regions = [(node, region) for _, tensor, node in targets for region, _ in target_regions(tensor)]
        regions += [(node, whole(node.shape)) for node in fresh]
        for node, region in regions:
            if isinstance(node, ShardedNode):
                ranks.update(held.rank for held in pieces_within(self._layout(self._names[id(node)], node), region))
        return [self._primary, *(self._open_rank(rank) for rank in sorted(ranks))]

    def verified_here(self) -> list[Archive]:
        return [self._open_rank(rank) for rank in self._verified_ranks]

    def _layout(self, name: str, node: ShardedNode) -> Layout:
        known = self._layouts.get(name)
        if known is None:
            tensor = self._tensors.get(name)
            if tensor is None or not _is_same(tensor, node):
                raise corrupt(self._path, f"its manifest and its files do not describe the tensor {name!r} alike")
            known = self._layouts[name] = self._manifest.layout(tensor)
        return known

    def _part(self, name: str, rank: int, box: Box) -> Part:
        archive = self._open_rank(rank)
        nodes = self._parts_by_rank.get(rank)
        if nodes is None:
            nodes = self._parts_by_rank[rank] = dict(sharded_nodes(archive.index.root))
        node = nodes.get(name)
        if node is not None and _is_same(self._tensors[name], node):
            for there, part in parts_of(node):
                if there.intersection(box) == box:
                    return Part(archive, box, _sub_node(part, _minus(box.offsets, there.offsets), box.sizes))
        raise corrupt(
            archive.file.path, f"it does not hold the part of {name!r} that its manifest promises", tensor=name
        )


def _is_same(tensor: ShardedTensor, node: ShardedNode) -> bool:
    return (tensor.dtype, tensor.shape, tensor.placements) == (node.dtype, node.shape, node.placements)


def _minus(offsets: Shape, start: Shape) -> Shape:
    return tuple([offset - first for offset, first in zip(offsets, start, strict=True)])


def _sub_node(node: TensorNode, offsets: Shape, sizes: Shape) -> TensorNode:
    start = node.offset + sum(offset * step for offset, step in zip(offsets, node.stride, strict=True))
    return TensorNode(node.storage, node.dtype, start, sizes, node.stride, node.flags.replace("p", "").replace("g", ""))


# What is wanted


def target_regions(tensor: torch.Tensor, key: str = "") -> Iterator[tuple[Box, torch.Tensor]]:
    """The regions of the whole tensor that are wanted here, each with the memory that it belongs to."""
    if not is_dtensor(tensor):
        yield whole(tensor.shape), tensor
        return
    local = local_tensor(tensor)
    layout = _layout_of_target(tensor, key)
    if layout is None:
        return
    rank = torch.distributed.get_rank()
    require_usual_shards(layout, rank, local)
    for piece in held_pieces(layout, rank):
        yield piece.box, narrowed(local, piece.local_offsets, piece.box.sizes)


@functools.lru_cache(maxsize=16)
def _mesh_of_target(device_mesh: Any) -> Mesh:
    return own_mesh(device_mesh)


def _layout_of_target(tensor: Any, key: str) -> Layout | None:
    """How the target is spread; ``None`` where this rank has no part of it."""
    mesh = _mesh_of_target(tensor.device_mesh)
    if torch.distributed.get_rank() not in mesh.positions:
        return None
    return Layout(key, tensor.dtype.itemsize, tuple(tensor.shape), mesh, tuple(placements_of(tensor, key)))


def check_targets(targets: Sequence[SpreadTarget], path: str) -> None:
    """Raise :class:`~lastgood.errors.TargetMismatchError` for a target that cannot be filled."""
    for key, tensor, _ in targets:
        try:
            for _ in target_regions(tensor, key):
                pass
        except UnsupportedStateError as error:
            raise TargetMismatchError(
                f"cannot load the key {key!r} of {path} into the target, which is a DTensor of a kind that cannot be "
                f"filled. Nothing has been changed. {error}",
                path=path,
                tensor=key,
            ) from error


def copy_spread(target: torch.Tensor, value: torch.Tensor) -> None:
    """Fill a target that is spread over ranks from the whole tensor."""
    for region, memory in target_regions(target):
        copy_into(memory, narrowed(value, region.offsets, region.sizes))


class WholeTensors:
    """Tensors that were spread over ranks, newly made as whole ones."""

    def __init__(self, nodes: Sequence[ShardedNode], map_location: MapLocation, source: "Source") -> None:
        self._map_location = map_location
        self._made: dict[int, torch.Tensor] = {}
        self._nodes = list({id(node): node for node in nodes}.values())
        for node in self._nodes:
            source.find(node, whole(node.shape))  # memory is made for what is there, not for what a file claims
            dtype = torch_dtype(node.dtype)
            nbytes = whole(node.shape).element_count * DTYPES[node.dtype].itemsize
            device = "meta" if is_meta(map_location) else "cpu"
            self._made[id(node)] = torch.empty(0, dtype=dtype, device=device).set_(
                new_storage(nbytes, device), 0, node.shape, contiguous_stride(node.shape)
            )

    def targets(self) -> list[SpreadTarget]:
        """What is to be read."""
        return [("", self._made[id(node)], node) for node in self._nodes]

    def tensor(self, node: ShardedNode) -> torch.Tensor:
        """The tensor of a node, once it has been read, where ``map_location`` wants it."""
        tensor = self._made[id(node)]
        if self._map_location is not None and not tensor.is_meta:
            storage = relocated(tensor.untyped_storage(), "cpu", self._map_location)
            tensor = torch.empty(0, dtype=tensor.dtype, device=storage.device).set_(
                storage, 0, node.shape, contiguous_stride(node.shape)
            )
        return with_flags(tensor, node.flags)


# Reading


def read_spread(targets: Sequence[SpreadTarget], source: Source, *, check: bool) -> dict[int, set[int]]:
    """Fill the targets; returns for each archive (by identity) the records that were read as a whole."""
    by_archive: dict[int, tuple[Archive, list[tuple[torch.Tensor, TensorNode]]]] = {}
    shared: set[int] = set()
    many_are_here = _ranks_here() >= _SHARED_FROM
    for tensor, node in _last_on_each_memory(targets):
        may_be_shared = many_are_here and isinstance(node, ShardedNode)
        for region, memory in target_regions(tensor):
            for part in source.find(node, region):
                inner = narrowed(memory, _minus(part.box.offsets, region.offsets), part.box.sizes)
                _, pairs = by_archive.setdefault(id(part.archive), (part.archive, []))
                pairs += _without_gaps(inner, part.node)
                if may_be_shared and (_is_wanted_by_others(tensor) or _has_gaps(part.node)):
                    shared.add(id(part.archive))
    done = {}
    for archive, pairs in by_archive.values():
        if id(archive) in shared:
            archive.file.expect_other_readers()
        read_pairs(archive, pairs, check=check)
        done[id(archive)] = {
            FIRST_STORAGE + node.storage
            for _, node in pairs
            if byte_range(node) == (0, archive.index.storages[node.storage].nbytes)
        }
    return done


def _last_on_each_memory(
    targets: Sequence[SpreadTarget],
) -> list[tuple[torch.Tensor, TensorNode | ShardedNode]]:
    """Of targets that are the very same memory (tied weights) the last one, which wins as with assignments."""
    last: dict[tuple[Any, ...], tuple[torch.Tensor, TensorNode | ShardedNode]] = {}
    for number, (_, tensor, node) in enumerate(targets):
        local = local_tensor(tensor) if is_dtensor(tensor) else tensor
        is_somewhere = local.numel() and not local.is_meta
        key = (local.device, local.data_ptr(), local.shape, local.stride()) if is_somewhere else (number,)
        last.pop(key, None)
        last[key] = (tensor, node)
    return list(last.values())


def _ranks_here() -> int:
    """How many ranks share this machine, as their launcher says."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def _is_wanted_by_others(tensor: torch.Tensor) -> bool:
    """Whether other ranks want the same parts of a saved tensor: all of it, or a replica."""
    if not is_dtensor(tensor):
        return True
    spread: Any = tensor
    sizes = zip(spread.placements, spread.device_mesh.shape, strict=True)
    return any(placement.is_replicate() and size > 1 for placement, size in sizes)


def _has_gaps(node: TensorNode) -> bool:
    """Whether what has to be read for this part of a tensor holds more than that: other ranks want the rest."""
    start, end = byte_range(node)
    return whole(node.shape).element_count * DTYPES[node.dtype].itemsize < end - start


def _without_gaps(target: torch.Tensor, node: TensorNode) -> Iterator[tuple[torch.Tensor, TensorNode]]:
    """The same in parts, so that no block of the file is read of which nothing is wanted."""
    if not node.shape or 0 in node.shape:
        yield target, node
        return
    step, dimension = max((step, number) for number, step in enumerate(node.stride))
    length = node.shape[dimension]
    shape = (*node.shape[:dimension], 1, *node.shape[dimension + 1 :])
    row = TensorNode(node.storage, node.dtype, node.offset, shape, node.stride, node.flags)
    start, end = byte_range(row)
    if length == 1 or step * DTYPES[node.dtype].itemsize - (end - start) < 2 * BLOCK_SIZE:
        yield target, node
        return
    for number in range(length):
        part = TensorNode(node.storage, node.dtype, node.offset + number * step, shape, node.stride, node.flags)
        yield from _without_gaps(target.narrow(dimension, number, 1), part)
