"""Sharded tensors without a model: any mesh, any placement, any dtype; what stands in which file; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.distributed import matrix_ranks, matrix_states
from tests.distributed.matrix_files import Parts
from tests.distributed.matrix_pool import Pool
from tests.helpers.saves import contents

from lastgood.errors import LastgoodError, RankMismatchError, TargetMismatchError, UnsupportedStateError
from lastgood.format.sharding import UNITS_PER_SHARE
from lastgood.types import RankInfo

# Meshes of up to three dimensions


@pytest.mark.parametrize("saved", [(2, 2, 2), (4,), (3, 1)], ids=str)
def test_tensors_placed_by_chance_load_as_placed_by_chance(
    pool: Pool, saved: tuple[int, ...], tmp_path: Path, rng_seed: int
) -> None:
    path = str(tmp_path / "checkpoint")
    sizes = {(2, 2, 2): 8, (4,): 4, (3, 1): 3}
    pool.ranks(sizes[saved]).call(matrix_states.save_on_mesh, path, saved, rng_seed)
    Parts(tmp_path / "checkpoint").assert_each_element_is_in_one_box()
    for loaded, world_size in (((8,), 8), ((2, 4), 8), ((2, 2), 4), ((3,), 3), ((1, 2, 1), 2)):
        pool.ranks(world_size).call(matrix_states.load_on_mesh, path, loaded, rng_seed, rng_seed + 1)
    pool.ranks(2).call(matrix_states.load_as_whole, path, rng_seed)
    pool.alone().call(matrix_states.load_as_whole, path, rng_seed)


def test_views_of_sharded_tensors(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path)
    three = pool.ranks(3)
    three.call(matrix_states.save_views, path)
    three.call(matrix_states.load_views, path)
    expected = three.call(matrix_states.views_as_saved)[0]
    three.call(matrix_states.load_whole_views, path, expected)
    pool.ranks(2).call(matrix_states.load_whole_views, path, expected)


def test_a_tensor_at_two_keys_is_written_once(pool: Pool, tmp_path: Path) -> None:
    pool.ranks(3).call(matrix_states.save_tied, str(tmp_path))
    parts = Parts(tmp_path)
    parts.assert_each_element_is_in_one_box()
    assert parts.shapes.keys() == {f"model.{name}" for name in ("in", "out", "same", "again")}
    written = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    assert 2 * 30_001 * 4 <= written <= 2 * 30_001 * 4 + 3 * 20_000  # and what is beside data in three files


# Each byte is written by one rank


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("ddp", 3), ("ddp", 8), ("fsdp", 3), ("tp", 4), ("fsdp-tp", 4), ("fsdp-tp", 8), ("hsdp", 4), ("hsdp", 8)],
)
@pytest.mark.parametrize("replicated", [False, True], ids=["plain", "declared"])
def test_the_files_divide_every_tensor_between_them(
    pool: Pool, layout: str, world_size: int, replicated: bool, tmp_path: Path
) -> None:
    pool.ranks(world_size).call(matrix_ranks.save_with, str(tmp_path), layout, replicated)
    parts = Parts(tmp_path)
    parts.assert_each_element_is_in_one_box()
    # What is divided in no way: nothing of the state if it is declared to be the same everywhere.
    whole = set().union(*parts.whole)
    if replicated:
        assert whole == {"rng"}
    else:
        assert "rng" in whole
        assert ("model.up.weight" in whole) == (layout == "ddp")
        assert not whole & parts.shapes.keys()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_replicas_are_divided_evenly(pool: Pool, world_size: int, tmp_path: Path) -> None:
    """No share is larger than another by more than a row of the units that it is made of."""
    pool.ranks(world_size).call(matrix_states.save_replicas, str(tmp_path), 1001)
    parts = Parts(tmp_path)
    parts.assert_each_element_is_in_one_box()
    for name in parts.shapes:
        written = parts.bytes_by_rank(name)
        even = sum(written) / world_size
        assert max(written) <= even * (1 + 1 / UNITS_PER_SHARE), name
    sizes = [path.stat().st_size for path in tmp_path.glob("*.pt")]
    assert max(sizes) <= min(sizes) * (1 + 1 / UNITS_PER_SHARE) + 8192  # headers, and the padding between records


def test_small_replicas_are_each_written_by_one_rank_and_not_all_by_the_same(pool: Pool, tmp_path: Path) -> None:
    pool.ranks(4).call(matrix_states.save_small_replicas, str(tmp_path), 64)
    parts = Parts(tmp_path)
    writers = [[rank for rank, _ in parts.boxes[name]] for name in parts.shapes]
    assert all(len(ranks) == 1 for ranks in writers)
    counts = [writers.count([rank]) for rank in range(4)]
    assert sum(counts) == 64
    assert min(counts) >= 4


# Refusals


REFUSED: list[tuple[Callable[[], Any], type[LastgoodError], str, list[str]]] = [
    (matrix_states.partial_sum, UnsupportedStateError, "model.sum", ["partial sum", "redistribute"]),
    (matrix_states.one_dotted_path, UnsupportedStateError, "model.a.b", ["same key path", "Rename"]),
    (matrix_states.shards_of_ones_own, UnsupportedStateError, "model.own", ["from_local", "distribute_tensor"]),
    (matrix_states.replicas_that_differ, RankMismatchError, "model.drifted", ["rank 1", "same on all ranks"]),
    (matrix_states.replicas_of_other_names, RankMismatchError, "model.only here", ["rank 1", "same on all ranks"]),
    (matrix_states.other_keys_on_one_rank, RankMismatchError, "model.extra", ["same keys"]),
    (matrix_states.other_shapes_on_one_rank, RankMismatchError, "model.weight", ["same shapes"]),
]


@pytest.mark.parametrize(
    ("make_state", "kind", "tensor", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_state_that_cannot_be_divided_is_refused_by_name_and_nothing_is_committed(
    pool: Pool,
    make_state: Callable[[], Any],
    kind: type[LastgoodError],
    tensor: str,
    words: list[str],
    tmp_path: Path,
) -> None:
    three = pool.ranks(3)
    assert three.call(matrix_states.attempt, str(tmp_path / "before"), matrix_states.good) == [None] * 3
    before = contents(tmp_path / "before")
    errors = three.call(matrix_states.attempt, str(tmp_path / "refused"), make_state)
    # Ranks that were well until then may only hear of it from the others.
    assert any(type(error) is kind and error.tensor == tensor for error in errors)
    for error in errors:
        assert isinstance(error, LastgoodError)
        for word in [tensor, *words]:
            assert word in str(error), str(error)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    assert contents(tmp_path / "before") == before
    assert three.call(matrix_states.attempt, str(tmp_path / "refused"), matrix_states.good) == [None] * 3
    three.call(matrix_states.load_good, str(tmp_path / "refused"))


@pytest.mark.parametrize("rank_info", [RankInfo(0, 1), RankInfo(0, 2)])
def test_a_checkpointer_of_fewer_ranks_than_the_mesh_has_refuses(
    pool: Pool, rank_info: RankInfo, tmp_path: Path
) -> None:
    for number, error in enumerate(pool.ranks(3).call(matrix_states.attempt_alone, str(tmp_path), rank_info)):
        assert isinstance(error, UnsupportedStateError)
        assert error.tensor == "model.weight"
        assert "[0, 1, 2]" in str(error)
        assert f"of a checkpoint of {rank_info.global_world_size}" in str(error), number
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("shape", ["(10,)", "(9,)"]),
        ("dtype", ["torch.float64", "torch.float32"]),
        ("meta", ["meta device"]),
        ("partial", ["partial sum"]),
    ],
)
def test_a_target_that_does_not_fit_is_refused_and_nothing_is_changed(
    pool: Pool, change: str, words: list[str], tmp_path: Path
) -> None:
    three = pool.ranks(3)
    assert three.call(matrix_states.attempt, str(tmp_path), matrix_states.good) == [None] * 3
    for error in three.call(matrix_states.attempt_load, str(tmp_path), change):
        assert isinstance(error, TargetMismatchError)
        for word in ["model.weight", *words]:
            assert word in str(error)
