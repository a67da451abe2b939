"""Random layouts, and the slow way to find out what lies where: cut whole arrays up as DTensor would."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from lastgood.format import sharding
from lastgood.format.mesh import Box, Layout, Mesh, Placement
from lastgood.format.sharding import Piece

LARGEST = 3000
"""Elements of a random tensor: cutting it up for every rank has to stay quick."""

NAMES = ("weight", "model.layers.7.mlp", "optimizer.état.exp_avg", "x\udc80", "")
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 12, 17)


@contextmanager
def smallest_share(nbytes: int) -> Iterator[None]:
    """Replicas divide tensors of this size already."""
    with mock.patch.object(sharding, "SMALLEST_SHARE", nbytes):
        yield


share_sizes = st.sampled_from([1, 4, 16, 64, 256, 1024 * 1024])


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """One to three dimensions, over ranks in any order, and not over all that there are."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = math.prod(shape)
    ranks = draw(st.permutations(range(count + 2)))
    names = draw(st.sampled_from([None, tuple(f"dimension {number}" for number in range(len(shape)))]))
    return Mesh(shape, names, tuple(ranks[:count]))


def placements(dimensions: int) -> st.SearchStrategy[Placement]:
    """Replicas and, along a dimension if there is one, plain and strided shards."""
    replicated = st.just(Placement(None))
    if dimensions == 0:
        return replicated
    sharded = st.builds(Placement, st.integers(0, dimensions - 1), st.sampled_from([1, 1, 1, 2, 3, 5]))
    return st.one_of(replicated, sharded, sharded)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any tensor of up to four dimensions, some of them empty or shorter than there are ranks, on any mesh."""
    mesh = draw(meshes())
    shape = draw(
        st.lists(st.sampled_from(SIZES), max_size=4).filter(lambda sizes: math.prod(sizes) <= LARGEST).map(tuple)
    )
    placed = tuple(draw(placements(len(shape))) for _ in mesh.shape)
    return Layout(draw(st.sampled_from(NAMES)), draw(st.sampled_from([1, 2, 4, 8, 16])), shape, mesh, placed)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A part of a tensor, which may be empty."""
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


def numbered(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """A tensor in which every element is its own number."""
    return np.arange(math.prod(shape)).reshape(shape)


def local_array(layout: Layout, rank: int) -> NDArray[np.int64]:
    """What the rules leave of the :func:`numbered` tensor on a rank, cut up step by step."""
    coordinates = np.argwhere(np.array(layout.mesh.ranks).reshape(layout.mesh.shape) == rank)[0]
    local = numbered(layout.shape)
    left_out = []
    for number, (placement, parts) in enumerate(zip(layout.placements, layout.mesh.shape, strict=True)):
        if placement.dimension is None:
            continue
        if comes_last(layout, number):
            left_out.append((placement.dimension, parts, coordinates[number]))
            continue
        cut = _chunks(local, placement.split_factor, placement.dimension)
        mine = [_chunks(part, parts, placement.dimension)[coordinates[number]] for part in cut]
        local = np.concatenate(mine, axis=placement.dimension)
    for dimension, parts, coordinate in reversed(left_out):
        local = _chunks(local, parts, dimension)[coordinate]
    return local


def comes_last(layout: Layout, number: int) -> bool:
    """Whether a placement is that of FSDP2 on what all placements after it have divided along the same dimension."""
    placement = layout.placements[number]
    after = [
        parts
        for inner, parts in zip(layout.placements[number + 1 :], layout.mesh.shape[number + 1 :], strict=True)
        if inner.dimension == placement.dimension
    ]
    inner = [
        later
        for later in range(number + 1, len(layout.placements))
        if layout.placements[later].dimension == placement.dimension and not comes_last(layout, later)
    ]
    are_plain = all(layout.placements[later].split_factor == 1 for later in inner)
    return are_plain and placement.split_factor > 1 and placement.split_factor == math.prod(after)


def _chunks(array: NDArray[np.int64], count: int, axis: int) -> list[NDArray[np.int64]]:
    """As torch.chunk, with empty ones for those that it leaves out."""
    width = math.ceil(array.shape[axis] / count)
    ends = np.minimum(np.arange(1, count) * width, array.shape[axis])
    return np.split(array, ends, axis=axis)


def slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """What selects this part of an array."""
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def assert_pieces_are_parts(layout: Layout, local: NDArray[np.int64], pieces: list[Piece]) -> NDArray[np.int64]:
    """Each piece names the global elements that stand at its place in the local array; returns how often each is in
    one."""
    counts = np.zeros(local.shape, np.int64)
    everything = numbered(layout.shape)
    for piece in pieces:
        here = slices(piece.local_offsets, piece.box.sizes)
        assert piece.box.element_count > 0
        assert local[here].shape == piece.box.sizes
        assert np.array_equal(local[here], everything[slices(*piece.box)])
        counts[here] += 1
    return counts


def writers(layout: Layout) -> NDArray[np.int64]:
    """For each element the rank that writes it; checks that there is exactly one."""
    found = np.full(layout.shape, -1)
    for rank in layout.mesh.ranks:
        for piece in sharding.written_pieces(layout, rank):
            target = found[(*slices(*piece.box), ...)]
            assert (target == -1).all(), f"rank {rank} writes {piece.box}, which another has written"
            target[...] = rank
    assert (found >= 0).all(), "some elements nobody writes"
    return found


def fsdp_on_tp(size: int, tensor_parallel: int, data_parallel: int) -> Iterator[tuple[int, list[int]]]:
    """What fully_shard leaves of a dimension that tensor parallelism has divided: first the one, then the other.

    By rank of a mesh of data by tensor parallel ranks.
    """
    divided = _chunks(np.arange(size), tensor_parallel, 0)
    for rank, (data, tensor) in enumerate(itertools.product(range(data_parallel), range(tensor_parallel))):
        yield rank, _chunks(divided[tensor], data_parallel, 0)[data].tolist()
