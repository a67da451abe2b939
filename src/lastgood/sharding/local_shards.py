"""What takes the place of a tensor that is spread over ranks when this rank's part of a state is described."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import torch

from lastgood.format.mesh import Mesh, Shape
from lastgood.format.sharding import Piece


class ShardDescription(msgspec.Struct, frozen=True):
    """A tensor that is spread over ranks, and where this rank's parts of it begin; what :class:`ShardedNode` notes.

    ``name`` is its key path.
    """

    name: str
    mesh: Mesh
    placements: tuple[str, ...]
    dtype: torch.dtype
    shape: Shape
    flags: str
    pieces: tuple[Piece, ...]


class LocalShards:
    """The parts of one tensor that this rank writes; ``replica`` is all of it where all ranks have to have the same.

    ``source`` is the DTensor that they are parts of: autograd counts changes of that, and not of its parts.
    """

    __slots__ = ("description", "replica", "source", "tensors")

    def __init__(
        self,
        description: ShardDescription,
        tensors: list[torch.Tensor],
        replica: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> None:
        self.source = source
        self.description = description
        self.tensors = tensors
        self.replica = replica

    def __reduce__(self) -> Any:
        raise TypeError("the shards of a tensor are described, never pickled")


def narrowed(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """The part of a tensor that begins at ``offsets``, on the same memory; the tensor itself if that is all of it."""
    for dimension, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, start, size)
    return tensor


def sources_of(shards: Iterable[LocalShards]) -> list[tuple[str, torch.Tensor]]:
    """The DTensors that these are parts of, with their names."""
    return [(each.description.name, each.source) for each in shards if each.source is not None]


def replicas_by_name(shards: Iterable[LocalShards]) -> list[tuple[str, torch.Tensor]]:
    """The whole tensors that all ranks have to have the same, in the order of their names."""
    found = [(each.description.name, each.replica) for each in shards if each.replica is not None]
    return sorted(found, key=lambda pair: pair[0])
