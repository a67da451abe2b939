"""Meshes of ranks, how tensors are placed on them, and boxes of tensors: the words that sharding is told in."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

_LARGEST_SPLIT_FACTOR = 64
"""More than the number of ranks makes no sense; few more do no harm."""


_MOST_DIMENSIONS = 64
"""As many as torch's operations can handle."""

_MOST_CUTS = 4096
"""Of one tensor on one rank; real ones are cut along one dimension."""

_MOST_PIECES = 2**20
"""Of one tensor on all ranks: 16,384 ranks may cut into 63 pieces each."""


_MOST_ELEMENTS = 2**63 - 1


Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST_ELEMENTS)]


Shape: TypeAlias = tuple[int, ...]


REPLICAS = "lastgood.replicas"
"""The name of the one dimension of the mesh on which tensors stand that were declared to be the same on all ranks."""


class Mesh(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """A device mesh: its shape, the names of its dimensions if they have any, and its ranks in row-major order."""

    shape: tuple[Count, ...]
    names: tuple[str, ...] | None
    ranks: tuple[Count, ...]

    @functools.cached_property
    def positions(self) -> dict[int, int]:
        """Where each rank stands in the row of all."""
        return {rank: position for position, rank in enumerate(self.ranks)}

    @functools.cached_property
    def known_pieces(self) -> dict[Any, Any]:
        """What :func:`~lastgood.format.sharding.pieces_within` has found on this mesh."""
        return {}

    def coordinates_of(self, rank: int) -> Shape | None:
        """Where in the mesh a rank stands; ``None`` if it is no part of it."""
        position = self.positions.get(rank)
        return None if position is None else unravel(position, self.shape)

    def rank_at(self, coordinates: Sequence[int]) -> int:
        """The rank that stands there."""
        position = 0
        for coordinate, size in zip(coordinates, self.shape, strict=True):
            position = position * size + coordinate
        return self.ranks[position]


class Placement(NamedTuple):
    """How a tensor is placed along one dimension of a mesh.

    ``dimension`` is the tensor's dimension that is divided, or ``None`` for a replica on each rank. With a
    ``split_factor`` above 1 the dimension is first cut into that many parts, and each of them is divided (what FSDP2
    does to a tensor that tensor parallelism has divided along the same dimension).
    """

    dimension: int | None
    split_factor: int = 1

    def __str__(self) -> str:
        """As torch prints it, and as files and manifests spell it."""
        if self.dimension is None:
            return "R"
        return f"S({self.dimension})" if self.split_factor == 1 else f"_S({self.dimension}, {self.split_factor})"


class Box(NamedTuple):
    """A part of a tensor: where it begins and how large it is, in elements along each dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def element_count(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def intersection(self, other: "Box") -> "Box | None":
        """What both have, or ``None``."""
        offsets, sizes = [], []
        for start, size, other_start, other_size in zip(*self, *other, strict=True):
            first, end = max(start, other_start), min(start + size, other_start + other_size)
            if first >= end:
                return None
            offsets.append(first)
            sizes.append(end - first)
        return Box(tuple(offsets), tuple(sizes))


class Layout(msgspec.Struct, frozen=True):
    """How one tensor is spread. Raises ``ValueError`` where that cannot be."""

    name: str
    itemsize: int
    shape: Shape
    mesh: Mesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        if len(self.placements) != len(self.mesh.shape):
            raise ValueError(f"{len(self.placements)} placements on a mesh of {len(self.mesh.shape)} dimensions")
        for placement in self.placements:
            if placement.split_factor > max(_LARGEST_SPLIT_FACTOR, len(self.mesh.ranks)):
                raise ValueError(f"the placement {placement} on a mesh of {len(self.mesh.ranks)} ranks")
            if placement.dimension is not None and not 0 <= placement.dimension < len(self.shape):
                raise ValueError(f"the placement {placement} of a tensor of shape {self.shape}")
        element_count(self.shape)
        if len(self.shape) > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {len(self.shape)} dimensions")
        cuts = _cut_count(self.shape, self.placements)
        if cuts > _MOST_CUTS or cuts * len(self.mesh.ranks) > _MOST_PIECES:
            raise ValueError(f"placements that cut a tensor of shape {self.shape} into very many parts")


def _cut_count(shape: Shape, placements: Sequence[Placement]) -> int:
    """About how many boxes a rank holds at most."""
    cuts = [1] * len(shape)
    for dimension, factor in placements:
        if dimension is not None and factor > 1:
            cuts[dimension] += min(factor, shape[dimension])
    return math.prod(cuts)


def replica_mesh(world_size: int) -> Mesh:
    """The mesh of all ranks in a row, for tensors that were declared to be the same on all of them."""
    return Mesh((world_size,), (REPLICAS,), tuple(range(world_size)))


def is_replica_mesh(mesh: Mesh) -> bool:
    """Whether it is such a mesh."""
    return mesh.names == (REPLICAS,)


def element_count(shape: Shape) -> int:
    """How many elements a tensor of this shape has; ``ValueError`` for more than torch can count."""
    if 0 in shape:
        return 0
    count = 1
    for length in shape:
        count *= length
        if count > _MOST_ELEMENTS:
            raise ValueError(f"a tensor of more than 2**63 elements in {len(shape)} dimensions")
    return count


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def check_mesh(mesh: Mesh) -> None:
    """Raise ``ValueError`` for what is no mesh."""
    if not mesh.ranks or not mesh.shape or element_count(mesh.shape) != len(mesh.ranks):
        raise ValueError(f"a mesh of shape {mesh.shape} with {len(mesh.ranks)} ranks")
    if len(mesh.positions) != len(mesh.ranks):
        raise ValueError("a mesh in which a rank stands twice")
    if mesh.names is not None and len(mesh.names) != len(mesh.shape):
        raise ValueError(f"a mesh of {len(mesh.shape)} dimensions with the names {mesh.names}")


_PLACEMENT = re.compile(r"R|S\((0|[1-9][0-9]{0,8})\)|_S\((0|[1-9][0-9]{0,8}), ([1-9][0-9]{0,8})\)")


@functools.lru_cache(maxsize=1024)
def parse_placement(text: str) -> Placement:
    """The placement of this spelling; ``ValueError`` for any other text."""
    match = _PLACEMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no placement")
    plain, strided, factor = match.groups()
    if plain is not None:
        return Placement(int(plain))
    placement = Placement(None) if strided is None else Placement(int(strided), int(factor))
    if str(placement) != text:
        raise ValueError(f"{text!r} is no placement in its canonical form")
    return placement


def unravel(position: int, shape: Shape) -> Shape:
    """The coordinates of a position in row-major order."""
    coordinates = []
    for size in reversed(shape):
        position, coordinate = divmod(position, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))
