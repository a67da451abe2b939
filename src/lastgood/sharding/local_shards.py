"""What takes the place of a tensor that is spread over ranks when this rank's part of a state is described."""

from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from lastgood.format.sharding import Mesh, Piece, Shape


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
    """The parts of one tensor that this rank writes; ``replica`` is all of it where all ranks have to have the same."""

    __slots__ = ("description", "replica", "tensors")

    def __init__(
        self, description: ShardDescription, tensors: list[torch.Tensor], replica: torch.Tensor | None = None
    ) -> None:
        self.description = description
        self.tensors = tensors
        self.replica = replica

    def __reduce__(self) -> Any:
        raise TypeError("the shards of a tensor are described, never pickled")


def replicas_by_name(shards: Iterable[LocalShards]) -> list[tuple[str, torch.Tensor]]:
    """The whole tensors that all ranks have to have the same, in the order of their names."""
    found = [(each.description.name, each.replica) for each in shards if each.replica is not None]
    return sorted(found, key=lambda pair: pair[0])
