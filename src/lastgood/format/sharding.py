"""Which part of a tensor lies on which rank: arithmetic on shapes, meshes, placements and ranks, and nothing else.

Every rank works out alone what it writes, and every reader from the manifest alone which file holds what: nobody has
to be asked. The rules are those of DTensor (``torch.chunk`` for a ``Shard``), and for replicas the ones that
docs/format.md gives. Nothing here takes longer where there are more ranks, but for what is asked for.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from lastgood.format.mesh import Box, Layout, Placement, Shape, unravel, whole
from lastgood.format.segments import Segments, Step, holders_within, length_of, positions_within, segments_of
from lastgood.format.spec import crc32

SMALLEST_SHARE = 1024 * 1024
"""Replicas divide what they all hold into shares of at least this many bytes; what is smaller, one of them writes."""

UNITS_PER_SHARE = 8
"""Shares are made of whole rows of the outermost dimensions; of so many that no share is much larger than another."""


_PIECES_REMEMBERED = 100_000
"""About how many a mesh keeps, as all are small."""


class Piece(NamedTuple):
    """A box of a tensor, and where it stands in the local tensor of the rank that holds it."""

    box: Box
    local_offsets: Shape


class HeldPiece(NamedTuple):
    """A box of a tensor, and the rank in whose file it is."""

    rank: int
    box: Box


# Along all dimensions


class _Division(NamedTuple):
    """Which dimensions of a mesh divide which dimension of a tensor, and which hold replicas."""

    steps: tuple[tuple[Step, ...], ...]
    mesh_dimensions: tuple[tuple[int, ...], ...]
    replica_dimensions: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _division(dimensions: int, mesh_shape: Shape, placements: tuple[Placement, ...]) -> _Division:
    replicas = tuple([number for number, placement in enumerate(placements) if placement.dimension is None])
    steps: list[tuple[Step, ...]] = []
    mesh_dimensions: list[tuple[int, ...]] = []
    for dimension in range(dimensions):
        numbers = [number for number, placement in enumerate(placements) if placement.dimension == dimension]
        order = _in_order([(number, Step(mesh_shape[number], placements[number].split_factor)) for number in numbers])
        mesh_dimensions.append(tuple([number for number, _ in order]))
        steps.append(tuple([step for _, step in order]))
    return _Division(tuple(steps), tuple(mesh_dimensions), replicas)


def _in_order(steps: list[tuple[int, Step]]) -> list[tuple[int, Step]]:
    """The divisions of one dimension, by the dimensions of the mesh that make them, in the order in which they come.

    A strided one whose factor is that of all divisions after it says that it comes last: FSDP2 divides what tensor
    parallelism has divided already. (DTensor itself cuts first then, which is the same where sizes divide evenly.)
    """
    order: list[tuple[int, Step]] = []
    for number, step in reversed(steps):
        are_plain = all(inner.split_factor == 1 for _, inner in order)
        if step.split_factor > 1 and are_plain and step.split_factor == math.prod(inner.parts for _, inner in order):
            order.append((number, Step(step.parts, 1)))
        else:
            order.insert(0, (number, step))
    return order


def has_two_readings(layout: Layout) -> bool:
    """Whether two ranks may hold other elements than these rules say, although all local shapes are as they say.

    A strided division may stand for what FSDP2 makes, or for what DTensor would make. With one division after it, some
    rank's shape tells them apart wherever they differ; with more, only sizes that divide evenly leave no doubt.
    """
    for dimension, size in enumerate(layout.shape):
        placed = [
            (parts, placement.split_factor)
            for parts, placement in zip(layout.mesh.shape, layout.placements, strict=True)
            if placement.dimension == dimension
        ]
        comes_last = any(
            factor > 1 and factor == math.prod(parts for parts, _ in placed[number + 1 :])
            for number, (_, factor) in enumerate(placed[:-2])
        )
        if comes_last and size % math.prod(parts for parts, _ in placed):
            return True
    return False


def _divide(layout: Layout) -> _Division:
    return _division(len(layout.shape), layout.mesh.shape, layout.placements)


def _segments_at(layout: Layout, coordinates: Shape) -> tuple[Segments, ...]:
    division = _divide(layout)
    return tuple(
        segments_of(size, steps, tuple([coordinates[number] for number in numbers]))
        for size, steps, numbers in zip(layout.shape, division.steps, division.mesh_dimensions, strict=True)
    )


def local_shape(layout: Layout, rank: int) -> Shape:
    """The shape of the local tensor of a rank of the mesh."""
    return tuple(length_of(segments) for segments in _segments_at(layout, _required_coordinates(layout, rank)))


def held_pieces(layout: Layout, rank: int) -> list[Piece]:
    """What a rank of the mesh holds, as boxes that do not overlap; several where a dimension is divided twice."""
    segments = _segments_at(layout, _required_coordinates(layout, rank))
    return _pieces_in(segments, whole([length_of(each) for each in segments]))


def written_pieces(layout: Layout, rank: int) -> list[Piece]:
    """Those of the held boxes, or parts of them, that this rank writes: of all replicas exactly one does."""
    coordinates = _required_coordinates(layout, rank)
    segments = _segments_at(layout, coordinates)
    shape = tuple(length_of(each) for each in segments)
    share = _share_of(layout, shape, _replica_number(layout, coordinates))
    return [piece for box in _share_boxes(shape, share) for piece in _pieces_in(segments, box)]


def pieces_within(layout: Layout, region: Box) -> list[HeldPiece]:
    """Where the elements of a region are: boxes that together are the region, each in one rank's file."""
    if not region.element_count:
        return []
    known: dict[Any, list[HeldPiece]] = layout.mesh.known_pieces
    # Layers of a model have tensors of the same form. The name counts only where it says who writes.
    key = (layout.shape, layout.itemsize, layout.placements, region, layout.name if _has_replicas(layout) else "")
    found = known.get(key)
    if found is None:
        found = _find_pieces(layout, region)
        if len(found) * len(known) > _PIECES_REMEMBERED:
            known.clear()
        known[key] = found
    return found


def _has_replicas(layout: Layout) -> bool:
    return _replica_count(layout) > 1


def _find_pieces(layout: Layout, region: Box) -> list[HeldPiece]:
    division = _divide(layout)
    by_dimension = [
        holders_within(size, steps, offset, offset + length)
        for size, steps, offset, length in zip(layout.shape, division.steps, *region, strict=True)
    ]
    if not division.replica_dimensions:
        return _pieces_of_shards(layout, by_dimension, region)
    found: list[HeldPiece] = []
    for holders in itertools.product(*by_dimension):
        coordinates = [0] * len(layout.mesh.shape)
        for (along, _), numbers in zip(holders, division.mesh_dimensions, strict=True):
            for coordinate, number in zip(along, numbers, strict=True):
                coordinates[number] = coordinate
        found += _pieces_of_replicas(layout, coordinates, tuple([segments for _, segments in holders]), region)
    return found


def _pieces_of_shards(
    layout: Layout, by_dimension: list[tuple[tuple[Shape, Segments], ...]], region: Box
) -> list[HeldPiece]:
    """The same where nobody holds what another one holds: the parts along each dimension, in all combinations."""
    mesh_shape, along = layout.mesh.shape, []
    weights = [math.prod(mesh_shape[number + 1 :]) for number in range(len(mesh_shape))]
    for holders, numbers, first, size in zip(by_dimension, _divide(layout).mesh_dimensions, *region, strict=True):
        along.append(
            [
                (sum(weights[number] * at for number, at in zip(numbers, coordinates, strict=True)), low, high - low)
                for coordinates, segments in holders
                for start, length in segments
                if (low := max(start, first)) < (high := min(start + length, first + size))
            ]
        )
    ranks = layout.mesh.ranks
    return [
        HeldPiece(
            ranks[sum([position for position, _, _ in parts])],
            Box(tuple([low for _, low, _ in parts]), tuple([size for _, _, size in parts])),
        )
        for parts in itertools.product(*along)
    ]


def _pieces_of_replicas(
    layout: Layout, coordinates: list[int], segments: tuple[Segments, ...], region: Box
) -> Iterator[HeldPiece]:
    """The parts of a region that lie in one shard, each with the replica of it that wrote them."""
    mesh, division = layout.mesh, _divide(layout)
    shape = tuple(length_of(each) for each in segments)
    replica_shape = tuple([mesh.shape[number] for number in division.replica_dimensions])
    for replica, share in _shares_within(layout, shape, segments, region):
        for number, coordinate in zip(division.replica_dimensions, unravel(replica, replica_shape), strict=True):
            coordinates[number] = coordinate
        rank = mesh.rank_at(coordinates)
        for local_box in _share_boxes(shape, share):
            for piece in _pieces_in(segments, local_box):
                box = piece.box.intersection(region)
                if box is not None:
                    yield HeldPiece(rank, box)


def _pieces_in(segments: tuple[Segments, ...], local: Box) -> list[Piece]:
    """A box of the local tensor, as boxes of the global one."""
    along: list[list[tuple[int, int, int]]] = []
    for each, first, size in zip(segments, *local, strict=True):
        pieces, position = [], 0
        for start, length in each:
            low, high = max(first, position), min(first + size, position + length)
            if low < high:
                pieces.append((start + low - position, high - low, low))
            position += length
        along.append(pieces)
    return [
        Piece(
            Box(tuple([start for start, _, _ in parts]), tuple([size for _, size, _ in parts])),
            tuple([position for _, _, position in parts]),
        )
        for parts in itertools.product(*along)
    ]


# Replicas: who writes what all of them hold


class _Share(NamedTuple):
    """A run of rows of a tensor, in row-major order of its first ``dimensions`` dimensions."""

    dimensions: int
    first: int
    end: int


def _replica_number(layout: Layout, coordinates: Shape) -> int:
    number = 0
    for dimension in _divide(layout).replica_dimensions:
        number = number * layout.mesh.shape[dimension] + coordinates[dimension]
    return number


def _replica_count(layout: Layout) -> int:
    return math.prod(layout.mesh.shape[dimension] for dimension in _divide(layout).replica_dimensions)


class _Shares(NamedTuple):
    """Into how many shares a shard is divided; share 0 is replica ``first``'s, the next one the next one's."""

    dimensions: int
    rows: int
    shares: int
    first: int
    replicas: int

    def share(self, number: int) -> _Share:
        return _Share(self.dimensions, self.rows * number // self.shares, self.rows * (number + 1) // self.shares)


def _shares(layout: Layout, shape: Shape) -> _Shares:
    replicas = _replica_count(layout)
    nbytes = math.prod(shape) * layout.itemsize
    count = min(replicas, max(1, nbytes // SMALLEST_SHARE))
    dimensions, rows = 0, 1
    if count > 1:
        while dimensions < len(shape) and rows < UNITS_PER_SHARE * count:
            rows *= shape[dimensions]
            dimensions += 1
        count = min(count, rows)
    # Where every replica has a share, names play no part: weights that are tied are then written by the same ranks.
    first = 0 if count == replicas else crc32(layout.name.encode("utf-8", "surrogatepass")) % replicas
    return _Shares(dimensions, rows, count, first, replicas)


def _share_of(layout: Layout, shape: Shape, replica: int) -> _Share | None:
    shares = _shares(layout, shape)
    number = (replica - shares.first) % shares.replicas
    return shares.share(number) if number < shares.shares else None


def _shares_within(
    layout: Layout, shape: Shape, segments: tuple[Segments, ...], region: Box
) -> Iterator[tuple[int, _Share]]:
    """The shares that may hold any of the region, with the replicas that write them."""
    shares = _shares(layout, shape)
    low = high = 0
    for number in range(shares.dimensions):
        first = region.offsets[number]
        inner = positions_within(segments[number], first, first + region.sizes[number])
        low, high = low * shape[number] + inner[0], high * shape[number] + max(inner[1] - 1, 0)
    numbers = range(shares.shares)
    # The share of row r is the last one that begins at or before it.
    for number in numbers[_share_with_row(shares, low) : _share_with_row(shares, high) + 1]:
        yield (shares.first + number) % shares.replicas, shares.share(number)


def _share_with_row(shares: _Shares, row: int) -> int:
    return ((row + 1) * shares.shares - 1) // shares.rows


def _share_boxes(shape: Shape, share: _Share | None) -> list[Box]:
    """A run of rows as boxes."""
    if share is None or share.first >= share.end:
        return []
    outer, inner = shape[: share.dimensions], shape[share.dimensions :]
    return [Box((*box.offsets, *(0,) * len(inner)), (*box.sizes, *inner)) for box in _run_boxes(outer, *share[1:])]


def _run_boxes(shape: Shape, first: int, end: int) -> list[Box]:
    """The elements ``first`` up to ``end`` of a tensor in row-major order, as few boxes."""
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((first,), (end - first,))]
    inner = math.prod(shape[1:])
    boxes: list[Box] = []
    row, rest = divmod(first, inner)
    if rest:  # the end of a row
        stop = min(end, (row + 1) * inner)
        boxes += [_prefixed(row, box) for box in _run_boxes(shape[1:], rest, stop - row * inner)]
        first, row = stop, row + 1
    last, rest = divmod(end, inner)
    if first < end and last > row:
        boxes.append(Box((row, *(0,) * (len(shape) - 1)), (last - row, *shape[1:])))
    if first < end and rest:  # the beginning of one
        boxes += [_prefixed(last, box) for box in _run_boxes(shape[1:], 0, rest)]
    return boxes


def _prefixed(row: int, box: Box) -> Box:
    return Box((row, *box.offsets), (1, *box.sizes))


def _required_coordinates(layout: Layout, rank: int) -> Shape:
    coordinates = layout.mesh.coordinates_of(rank)
    if coordinates is None:
        raise ValueError(f"rank {rank} is no part of the mesh of {layout.name!r}")
    return coordinates
