"""Which part of a tensor lies on which rank, and who writes it: against arrays that are really cut up."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.sharding.layouts import (
    assert_pieces_are_parts,
    comes_last,
    fsdp_on_tp,
    layouts,
    local_array,
    regions,
    share_sizes,
    slices,
    smallest_share,
    writers,
)

from lastgood.format.mesh import Box, Layout, Mesh, Placement, is_replica_mesh, parse_placement, replica_mesh, whole
from lastgood.format.sharding import SMALLEST_SHARE, held_pieces, local_shape, pieces_within, written_pieces

REPLICATED = Placement(None)


def on_replicas(name: str, shape: tuple[int, ...], replicas: int, itemsize: int = 4) -> Layout:
    return Layout(name, itemsize, shape, replica_mesh(replicas), (REPLICATED,))


def written_bytes(layout: Layout) -> dict[int, int]:
    return {
        rank: layout.itemsize * sum(piece.box.element_count for piece in written_pieces(layout, rank))
        for rank in layout.mesh.ranks
    }


# What a rank holds


@given(layouts())
def test_a_rank_holds_what_cutting_up_the_tensor_leaves_it(layout: Layout) -> None:
    for rank in layout.mesh.ranks:
        local = local_array(layout, rank)
        assert local_shape(layout, rank) == local.shape
        assert (assert_pieces_are_parts(layout, local, held_pieces(layout, rank)) == 1).all()


@given(layouts(), share_sizes)
def test_every_element_is_written_by_exactly_one_rank_that_holds_it(layout: Layout, share: int) -> None:
    with smallest_share(share):
        writers(layout)
        for rank in layout.mesh.ranks:
            local = local_array(layout, rank)
            assert (assert_pieces_are_parts(layout, local, written_pieces(layout, rank)) <= 1).all()


@given(st.data(), layouts(), share_sizes)
def test_a_region_is_found_once_with_the_ranks_that_wrote_it(data: st.DataObject, layout: Layout, share: int) -> None:
    region = data.draw(regions(layout.shape))
    with smallest_share(share):
        written_by = writers(layout)
        found = pieces_within(layout, region)
    counts = np.zeros(layout.shape, int)
    for piece in found:
        assert piece.box.element_count > 0
        assert (written_by[slices(*piece.box)] == piece.rank).all()
        counts[slices(*piece.box)] += 1
    expected = np.zeros(layout.shape, int)
    expected[slices(*region)] = 1
    assert np.array_equal(counts, expected)


@given(layouts(), share_sizes)
def test_the_whole_tensor_is_found_in_the_pieces_that_were_written(layout: Layout, share: int) -> None:
    """A reader that wants everything cuts nothing further up: what it finds are the written pieces themselves."""
    with smallest_share(share):
        found = Counter((piece.rank, piece.box) for piece in pieces_within(layout, whole(layout.shape)))
        written = Counter((rank, piece.box) for rank in layout.mesh.ranks for piece in written_pieces(layout, rank))
    assert found == written


def test_a_rank_outside_the_mesh_holds_nothing_that_could_be_asked_for() -> None:
    layout = Layout("w", 4, (8,), Mesh((2,), None, (3, 1)), (Placement(0),))
    for ask in (local_shape, held_pieces, written_pieces):
        with pytest.raises(ValueError, match="rank 2 is no part of the mesh of 'w'"):
            ask(layout, 2)
    assert local_shape(layout, 1) == (4,)


# Replicas


@pytest.mark.parametrize("inner", [(), (2,)], ids=["elements", "rows"])
def test_every_single_element_is_found_with_the_replica_that_wrote_it(inner: tuple[int, ...]) -> None:
    """At every border between shares, and on both sides of it."""
    with smallest_share(4):
        for length in range(1, 27):
            for replicas in range(1, 6):
                layout = on_replicas("w", (length, *inner), replicas)
                written_by = writers(layout)
                for place in np.ndindex(layout.shape):
                    region = Box(place, (1,) * len(place))
                    assert pieces_within(layout, region) == [(written_by[place], region)]


@given(
    st.integers(1, 64),
    st.lists(st.integers(1, 5000), min_size=1, max_size=4).map(tuple),
    st.sampled_from([1, 2, 4, 8]),
)
def test_replicas_of_a_large_tensor_write_about_equally_much(
    replicas: int, inner: tuple[int, ...], itemsize: int
) -> None:
    rows = math.ceil(replicas * SMALLEST_SHARE / (math.prod(inner) * itemsize))
    for shape in ((rows, *inner), (*inner, rows)):
        written = written_bytes(on_replicas("w", shape, replicas, itemsize)).values()
        assert len(written) == replicas
        # Shares are runs of eight rows at least, of which one may have one more than another.
        assert max(written) <= 1.15 * min(written)


@given(layouts(), share_sizes)
def test_no_replica_writes_much_more_than_its_part_of_a_divided_shard(layout: Layout, share: int) -> None:
    """Whatever is divided, is divided evenly: shares differ by one part in eight, or by one row of one element."""
    with smallest_share(share):
        by_shard: dict[tuple[int, ...], list[int]] = {}
        for rank in layout.mesh.ranks:
            count = sum(piece.box.element_count for piece in written_pieces(layout, rank))
            by_shard.setdefault(tuple(local_array(layout, rank).flatten().tolist()), []).append(count)
    for elements, counts in by_shard.items():
        assert sum(counts) == len(elements)
        busy = [count for count in counts if count]
        if elements and len(counts) > 1:
            assert len(busy) == min(len(counts), max(1, len(elements) * layout.itemsize // share), len(elements))
            assert max(busy) <= max(1.125 * min(busy), min(busy) + 1)


def test_small_tensors_are_spread_over_the_replicas_by_their_names() -> None:
    parts = ("attention.query.weight", "attention.key.weight", "norm.bias", "mlp.up.weight", "mlp.down.weight")
    names = [
        f"{group}.layers.{number}.{part}" for group in ("model", "exp_avg") for number in range(160) for part in parts
    ]
    written: Counter[int] = Counter()
    for name in names:
        counts = {rank: nbytes for rank, nbytes in written_bytes(on_replicas(name, (100,), 8)).items() if nbytes}
        assert list(counts.values()) == [400], "what is small, one replica writes alone"
        written.update(counts)
    mean = 400 * len(names) / 8
    assert sorted(written) == list(range(8))
    assert 0.75 * mean < min(written.values())
    assert max(written.values()) < 1.25 * mean


@given(st.text(max_size=5), st.text(max_size=5), st.integers(1, 8), st.sampled_from([(24, 2), (7, 9), (64,)]))
def test_tied_tensors_are_written_by_the_same_ranks(
    first: str, second: str, replicas: int, shape: tuple[int, ...]
) -> None:
    """Where every replica has a share, the name plays no part: a rank's share of the weight is in its file once."""
    with smallest_share(4):
        for rank in range(replicas):
            one, other = (written_pieces(on_replicas(name, shape, replicas), rank) for name in (first, second))
            assert one == other != []


# Nothing but names, shapes, meshes and ranks

_PRINT_EVERYTHING = """
import hashlib, random, sys
from lastgood.format.mesh import *
from lastgood.format.sharding import *
seed, order = int(sys.argv[1]), sys.argv[2]
rng = random.Random(seed)
cases = []
for number in range(300):
    shape = tuple(rng.choice([1, 3, 8, 700, 1024]) for _ in range(rng.randint(1, 3)))
    mesh_shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.randint(1, 3)))
    ranks = list(range(27)); rng.shuffle(ranks)
    size = 1
    for each in mesh_shape: size *= each
    placements = tuple(rng.choice([Placement(None), Placement(0), Placement(len(shape) - 1, 2)]) for _ in mesh_shape)
    cases.append((number, Layout(f"t{number}", 4, shape, Mesh(mesh_shape, None, tuple(ranks[:size])), placements)))
if order == "backwards":
    cases.reverse()
found = {}
for number, layout in cases:
    ranks = layout.mesh.ranks if order == "forwards" else layout.mesh.ranks[::-1]
    written = {rank: written_pieces(layout, rank) for rank in ranks}
    found[number] = repr((sorted(written.items()), sorted(pieces_within(layout, whole(layout.shape)))))
print(hashlib.sha256("".join(found[number] for number in range(300)).encode()).hexdigest())
print("torch" in sys.modules)
"""


def test_every_process_finds_the_same_whatever_it_has_asked_before(rng_seed: int) -> None:
    answers = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_EVERYTHING, str(rng_seed), order],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order, hash_seed in (("forwards", "1"), ("backwards", "2"))
    }
    assert len(answers) == 1
    assert answers.pop().splitlines()[1] == "False", "the arithmetic does without torch"


@given(layouts(), share_sizes)
def test_names_of_mesh_dimensions_play_no_part(layout: Layout, share: int) -> None:
    mesh = Mesh(layout.mesh.shape, tuple("abc"[: len(layout.mesh.shape)]), layout.mesh.ranks)
    other = Layout(layout.name, layout.itemsize, layout.shape, mesh, layout.placements)
    with smallest_share(share):
        for rank in mesh.ranks:
            assert written_pieces(layout, rank) == written_pieces(other, rank)


# What cannot be


@given(st.builds(Placement, st.none() | st.integers(0, 999_999_999), st.integers(1, 999_999_999)))
def test_placements_are_spelt_in_one_way(placement: Placement) -> None:
    if placement.dimension is None:
        placement = REPLICATED
    assert parse_placement(str(placement)) == placement


@pytest.mark.parametrize(
    "text",
    ["", "r", "R ", "R\n", "P", "P(sum)", "S", "S()", "S(-1)", "S(01)", "S( 0)", "S(0)\n", "S(\u0661)", "S(0, 2)",
     "S(1234567890)", "_S(0)", "_S(0,2)", "_S(0, 0)", "_S(0, 1)", "_S(0, 02)", "_S(0, -2)", "_S(None, 2)"],
)  # fmt: skip
def test_no_other_spelling_is_taken(text: str) -> None:
    with pytest.raises(ValueError, match="is no placement"):
        parse_placement(text)


@pytest.mark.parametrize(
    ("mesh", "placements", "said"),
    [
        (Mesh((2,), None, (0,)), (REPLICATED,), r"a mesh of shape \(2,\) with 1 ranks"),
        (Mesh((0,), None, ()), (REPLICATED,), r"a mesh of shape \(0,\) with 0 ranks"),
        (Mesh((), None, (0,)), (), r"a mesh of shape \(\) with 1 ranks"),
        (Mesh((2,), None, (4, 4)), (REPLICATED,), "a rank stands twice"),
        (Mesh((2,), ("a", "b"), (0, 1)), (REPLICATED,), r"1 dimensions with the names \('a', 'b'\)"),
        (Mesh((2,), None, (0, 1)), (), "0 placements on a mesh of 1 dimensions"),
        (Mesh((2,), None, (0, 1)), (REPLICATED, REPLICATED), "2 placements on a mesh of 1 dimensions"),
        (Mesh((2,), None, (0, 1)), (Placement(2),), r"the placement S\(2\) of a tensor of shape \(4, 4\)"),
        (Mesh((2,), None, (0, 1)), (Placement(-1),), r"the placement S\(-1\) of a tensor of shape \(4, 4\)"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(mesh: Mesh, placements: tuple[Placement, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layout("w", 4, (4, 4), mesh, placements)


def test_declared_replicas_stand_on_a_mesh_of_their_own() -> None:
    assert is_replica_mesh(replica_mesh(3))
    assert replica_mesh(3).ranks == (0, 1, 2)
    assert not is_replica_mesh(Mesh((3,), None, (0, 1, 2)))


@given(st.data(), st.lists(st.integers(0, 6), max_size=4).map(tuple))
def test_the_intersection_of_boxes_is_what_both_have(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(regions(shape)), data.draw(regions(shape))
    both = np.zeros(shape, int)
    for box in (one, other):
        both[slices(*box)] += 1
    common = one.intersection(other)
    assert common == other.intersection(one)
    expected = np.zeros(shape, int)
    if common is not None:
        expected[slices(*common)] = 1
    assert np.array_equal(both == 2, expected == 1)
    assert common is None or common.element_count == int((both == 2).sum())
    assert Box((), ()).element_count == 1


# DTensor itself

_WORLD_SIZE = 8
_MESHES = [(2, 4), (4, 2), (2, 2, 2), (8,), (3, 2), (2, 3), (1, 5)]


def _random_case(rng: random.Random) -> dict[str, Any]:
    mesh_shape = rng.choice(_MESHES)
    ranks = rng.sample(range(_WORLD_SIZE), math.prod(mesh_shape))
    shape = [rng.choice([1, 2, 3, 5, 8, 9, 13, 27]) for _ in range(rng.randint(1, 3))]
    placed = []
    for _ in mesh_shape:
        dimension = rng.randrange(len(shape))
        placed.append(rng.choice([[None, 1], [dimension, 1], [dimension, 1], [dimension, 2], [dimension, 3]]))
    return {"shape": shape, "mesh": [mesh_shape, ranks], "placements": placed}


def _on_fake_ranks(what: str, cases: list[Any]) -> list[dict[str, Any]]:
    found = subprocess.run(
        [sys.executable, "-m", "tests.unit.sharding.fake_ranks", what, str(_WORLD_SIZE)],
        input=json.dumps(cases),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    answers: list[dict[str, Any]] = json.loads(found.stdout)
    return answers


def test_dtensor_places_the_same_elements_on_the_same_ranks(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    cases = [_random_case(rng) for _ in range(150)]
    for case, answers in zip(cases, _on_fake_ranks("distribute", cases), strict=True):
        mesh_shape, ranks = case["mesh"]
        placed = tuple(Placement(dimension, factor) for dimension, factor in case["placements"])
        layout = Layout("w", 8, tuple(case["shape"]), Mesh(tuple(mesh_shape), None, tuple(ranks)), placed)
        if any(comes_last(layout, number) for number in range(len(placed))):
            continue  # what FSDP2 makes of it is compared below
        assert sorted(answers) == sorted(map(str, ranks))
        for rank in ranks:
            answer = answers[str(rank)]
            local = np.array(answer["values"], int).reshape(answer["shape"])
            assert local_shape(layout, rank) == tuple(answer["shape"])
            assert (assert_pieces_are_parts(layout, local, held_pieces(layout, rank)) == 1).all()


def _held_of_column(size: int, data_parallel: int, tensor_parallel: int) -> dict[int, list[int]]:
    mesh = Mesh((data_parallel, tensor_parallel), None, tuple(range(data_parallel * tensor_parallel)))
    strided = Placement(0, tensor_parallel)
    layout = Layout("w", 4, (size,), mesh, (strided, Placement(0)))
    return {
        rank: [
            element
            for piece in held_pieces(layout, rank)
            for element in range(piece.box.offsets[0], piece.box.offsets[0] + piece.box.sizes[0])
        ]
        for rank in mesh.ranks
    }


def test_fsdp_on_tensor_parallel_shards_is_understood_even_and_uneven() -> None:
    """``fully_shard`` divides the shards of tensor parallelism; DTensor reads its placements the other way round."""
    for size in range(64):
        for tensor_parallel in range(1, 7):
            for data_parallel in range(1, 7):
                held = _held_of_column(size, data_parallel, tensor_parallel)
                real = dict(fsdp_on_tp(size, tensor_parallel, data_parallel))
                assert real == held


def test_what_fully_shard_makes_of_tensor_parallel_shards() -> None:
    """That the reference above is what torch does, even and uneven."""
    cases = [[size, data, tensor] for size in (16, 9, 7, 27, 12) for data, tensor in ((2, 4), (4, 2))]
    for (size, data, tensor), answers in zip(cases, _on_fake_ranks("fully_shard", cases), strict=True):
        expected = {str(rank): elements for rank, elements in fsdp_on_tp(size, tensor, data)}
        assert {rank: answer["values"] for rank, answer in answers.items()} == expected
        assert {tuple(answer["placements"]) for answer in answers.values()} == {(f"_S(0, {tensor})", "S(0)")}
