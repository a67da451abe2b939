"""The votes of several ranks, and what becomes of them when rank 0 counts."""

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.unit.sharding.ballots import SAVE_ID, RankFile, Tables, count, files_of, rank_file, sharded

from lastgood.errors import CorruptCheckpointError, RankMismatchError, UnsupportedStateError
from lastgood.format.manifest import (
    InvalidManifestError,
    Manifest,
    ShardedTensor,
    checkpoint_file,
    decode_manifest,
    encode_manifest,
)
from lastgood.format.mesh import Box, Mesh, replica_mesh, whole
from lastgood.format.nodes import ShardedNode, walk_leaves
from lastgood.format.sharding import pieces_within, written_pieces
from lastgood.format.spec import crc32
from lastgood.format.vote import group_of, tally
from lastgood.sharding.divide import Divider
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

OTHER_SAVE = "a5" * 16
WEIGHTS = {"model": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)}}
FOUR = Mesh((2, 2), ("data", "tensor"), (0, 1, 2, 3))


def same(world_size: int) -> list[Any]:
    """Equal states of all ranks."""
    return [{**WEIGHTS, "step": 7} for _ in range(world_size)]


def spread(rank: int, mesh: Mesh = FOUR, shape: tuple[int, ...] = (7, 5), dtype: torch.dtype = torch.float32) -> Any:
    """A rank's state with two tensors on the mesh; both are the same on all ranks of it."""
    weight = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    return {
        "model": {
            "up": sharded("model.up", weight, mesh, ("_S(0, 2)", "S(0)"), rank),
            "down": sharded("model.down", weight.T.contiguous(), mesh, ("R", "S(1)"), rank),
        }
    }


def held_in(file: RankFile, name: str) -> list[Box]:
    """The boxes of a tensor that are in a file, as its own index says."""
    node = dict(walk_leaves(file.archive.index.root))[name]
    assert isinstance(node, ShardedNode)
    return [Box(offsets, item.shape) for offsets, item in zip(node.offsets, node.items, strict=True)]


# Votes that agree


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_equal_votes_make_a_manifest_of_every_file_and_every_tensor(tmp_path: Path, world_size: int) -> None:
    files = files_of(tmp_path, same(world_size), ["model.*"])
    manifest = count(files)
    assert (manifest.save_id, manifest.world_size) == (SAVE_ID, world_size)
    for rank, entry in enumerate(manifest.files):
        stored = tmp_path / entry.name
        assert entry.name == f"checkpoint_{rank}.pt"
        assert (entry.rank, entry.size, entry.save_id) == (rank, stored.stat().st_size, SAVE_ID)
        assert entry.trailer_crc == crc32(files[rank].archive.trailer_bytes)
    assert manifest.meshes == [replica_mesh(world_size)]
    assert manifest.tensors == [
        ShardedTensor("model.bias", "float32", (3,), 0, ("R",)),
        ShardedTensor("model.weight", "float32", (3, 4), 0, ("R",)),
    ]
    assert manifest.differing == []


def test_the_manifest_says_of_every_file_what_is_in_it(tmp_path: Path) -> None:
    """With the arithmetic alone a reader finds in each file just what the file says of itself."""
    files = files_of(tmp_path, [spread(rank) for rank in range(4)])
    manifest = decode_manifest(encode_manifest(count(files)))
    assert [tensor.name for tensor in manifest.tensors] == ["model.down", "model.up"]
    assert manifest.meshes == [FOUR]
    for tensor in manifest.tensors:
        layout = manifest.layout(tensor)
        by_rank: dict[int, list[Box]] = {rank: [] for rank in range(4)}
        for piece in pieces_within(layout, whole(tensor.shape)):
            by_rank[piece.rank].append(piece.box)
        for rank, file in enumerate(files):
            assert sorted(held_in(file, tensor.name)) == sorted(by_rank[rank])
            assert held_in(file, tensor.name) == [piece.box for piece in written_pieces(layout, rank)]


def test_each_table_is_passed_on_and_fetched_once_however_many_ranks_there_are(tmp_path: Path) -> None:
    files = files_of(tmp_path, same(4), ["model.*"])
    tables = Tables(files)
    assert all(file.ballot.tables.keys() == files[0].ballot.tables.keys() for file in files)
    tally([file.ballot.vote for file in files], tables.fetch, SAVE_ID)
    assert len(tables.fetched) == len(set(tables.fetched)) == 1, "the layouts; equal replicas need no look at them"


def test_a_vote_is_as_small_for_a_large_state_as_for_a_small_one(tmp_path: Path) -> None:
    many = {"model": {f"layer {number}": torch.ones(number % 7, 3) for number in range(400)}}
    few = {"model": {"layer": torch.ones(2)}}
    large, small = (
        rank_file(tmp_path / name, 1, 4, state, ["model.*"]).ballot
        for name, state in (("many", many), ("few", few))
        if (tmp_path / name).mkdir() is None
    )
    assert sum(map(len, large.tables.values())) > 50 * sum(map(len, small.tables.values()))
    assert abs(len(large.vote) - len(small.vote)) <= len(str(10**9)), "but for the digits of the file's size"


def test_meshes_of_a_part_of_the_ranks_stand_side_by_side(tmp_path: Path) -> None:
    """Pipeline stages: each has its own mesh, and its own tensors on it."""
    meshes = [Mesh((2,), ("data",), (0, 1)), Mesh((2,), ("data",), (2, 3))]
    weight = torch.arange(6.0)
    states = []
    for rank in range(4):
        stage = rank // 2
        name = f"stage {stage}"
        states.append({name: sharded(name, weight, meshes[stage], ("S(0)",), rank)})
    manifest = count(files_of(tmp_path, states))
    assert manifest.meshes == meshes
    assert [(tensor.name, tensor.mesh) for tensor in manifest.tensors] == [("stage 0", 0), ("stage 1", 1)]


def test_a_save_without_spread_tensors_is_counted_too(tmp_path: Path) -> None:
    manifest = count(files_of(tmp_path, same(3)))
    assert (manifest.meshes, manifest.tensors, len(manifest.files)) == ([], [], 3)


# Votes that do not count


def test_the_file_of_another_save_gets_no_ballot(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="is not the file that rank 1 wrote in this save") as raised:
        rank_file(tmp_path, 1, 2, WEIGHTS, save_id=OTHER_SAVE)
    assert raised.value.rank == 1
    assert raised.value.path == checkpoint_file(str(tmp_path), 1)
    assert raised.value.phase == "commit"


def test_a_file_that_no_manifest_will_join_gets_no_ballot(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="the checkpoint is not committed"):
        rank_file(tmp_path, 0, 2, WEIGHTS, independent=True)


def test_a_vote_of_another_save_is_not_counted(tmp_path: Path) -> None:
    files = files_of(tmp_path, same(3))
    files[2] = rank_file(tmp_path, 2, 3, WEIGHTS, save_id=OTHER_SAVE, voted_save=OTHER_SAVE)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_2\.pt is not the file that rank 2 wrote") as raised:
        count(files)
    assert (raised.value.rank, raised.value.phase) == (2, "commit")


def test_a_vote_in_the_place_of_another_rank_is_not_counted(tmp_path: Path) -> None:
    files = files_of(tmp_path, same(3))
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_1\.pt is not the file"):
        count([files[0], files[2], files[1]])
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_2\.pt is not the file"):
        count([files[0], files[1], files[1]])


def test_a_vote_of_a_job_of_another_size_is_not_counted(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_0\.pt is not the file"):
        count(files_of(tmp_path, same(3))[:2])


# Ranks that hold different tensors


def test_a_rank_that_did_not_save_the_tensors_of_its_mesh_is_named(tmp_path: Path) -> None:
    states = [spread(rank) for rank in range(4)]
    states[2] = {"model": {}}
    with pytest.raises(RankMismatchError, match=r"some did not save .* on it \(ranks \[2\]\)") as raised:
        count(files_of(tmp_path, states))
    assert (raised.value.rank, raised.value.phase) == (2, "commit")


@pytest.mark.parametrize("change", [{"shape": (7, 6)}, {"dtype": torch.float64}], ids=["shape", "dtype"])
def test_tensors_that_differ_in_shape_or_dtype_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    states = [spread(rank, **(change if rank == 3 else {})) for rank in range(4)]
    with pytest.raises(RankMismatchError, match=re.escape("they do not agree on 'model.down', 'model.up'")) as raised:
        count(files_of(tmp_path, states))
    assert raised.value.tensor == "model.down"
    assert "earlier ones are untouched" in str(raised.value)


def test_a_tensor_that_one_rank_has_besides_is_named(tmp_path: Path) -> None:
    states = [spread(rank) for rank in range(4)]
    states[1]["more"] = sharded("more", torch.ones(4), FOUR, ("R", "S(0)"), 1)
    with pytest.raises(RankMismatchError, match="do not agree on 'more'") as raised:
        count(files_of(tmp_path, states))
    assert raised.value.tensor == "more"


def test_one_name_on_two_meshes_is_refused(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    meshes = [Mesh((2,), None, (0, 1)), Mesh((2,), None, (2, 3))]
    states = [{"w": sharded("w", weight, meshes[rank // 2], ("S(0)",), rank)} for rank in range(4)]
    with pytest.raises(RankMismatchError, match="'w' is spread over two meshes") as raised:
        count(files_of(tmp_path, states))
    assert raised.value.tensor == "w"


# What was declared to be the same


def test_a_replica_that_differs_fails_the_save_by_name(tmp_path: Path) -> None:
    states = same(4)
    states[2] = {"model": {"weight": WEIGHTS["model"]["weight"], "bias": torch.tensor([1.0, 1.0, 1.0000001])}}
    with pytest.raises(RankMismatchError, match=r"the tensors model\.bias were declared.*rank 2 holds") as raised:
        count(files_of(tmp_path, states, ["model.*"]))
    assert (raised.value.tensor, raised.value.rank, raised.value.phase) == ("model.bias", 2, "commit")


def test_it_is_noticed_by_ranks_that_do_not_write_the_tensor(tmp_path: Path) -> None:
    """Whichever rank differs, and whoever writes the tensor."""
    for odd in range(3):
        states = [{"w": torch.full((5,), float(rank == odd))} for rank in range(3)]
        with pytest.raises(RankMismatchError, match="the tensors w were declared"):
            count(files_of(tmp_path, states, ["w"]))


def test_of_many_differing_replicas_the_first_are_named(tmp_path: Path) -> None:
    states = [{f"w{number}": torch.tensor([number * rank]) for number in range(9)} for rank in range(2)]
    with pytest.raises(RankMismatchError, match="the tensors w1, w2, w3, w4, w5 and 3 more were declared"):
        count(files_of(tmp_path, states, ["*"]))


def test_a_replica_that_a_rank_has_not_got_is_named(tmp_path: Path) -> None:
    states: list[Any] = [{"w": torch.ones(2), "v": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(RankMismatchError, match="the tensors v were declared"):
        count(files_of(tmp_path, states, ["*"]))


# Other values


def test_values_that_differ_between_ranks_are_known_by_their_groups(tmp_path: Path) -> None:
    states = [
        {"step": 7, "seed": rank, "data": {"position": [1, rank]}, "rng": torch.tensor([rank]), "mean": torch.ones(3)}
        for rank in range(3)
    ]
    manifest = count(files_of(tmp_path, states))
    assert manifest.differing == sorted({group_of("seed"), group_of("data.position[1]"), group_of("rng")})
    assert group_of("step") not in manifest.differing


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, 1.0), (1, True), (0.0, -0.0), (None, False), ("1", 1), (b"1", "1"), (float("nan"), float("inf")),
     ([1], [1, None]), (torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.ones(2, dtype=torch.float64)),
     (torch.ones(2, 3), torch.ones(3, 2)), (torch.ones(2), [1.0, 1.0]), ({"a": 1}, {"b": 1})],
    ids=str,
)  # fmt: skip
def test_one_value_that_differs_is_enough(tmp_path: Path, one: Any, other: Any) -> None:
    common = {"step": 3, "name": "run"}
    found = count(files_of(tmp_path, [common | {"x": one}, common | {"x": one}, common | {"x": other}])).differing
    inside = {"x", "x[0]", "x[1]", "x.a", "x.b"}
    assert found
    assert set(found) <= {group_of(path) for path in inside}
    assert count(files_of(tmp_path, [common | {"x": other}] * 3)).differing == []


def test_what_only_a_pickle_describes_counts_as_different(tmp_path: Path) -> None:
    """Nobody can say of it that it is the same: it never passes for that."""
    states = [{"x": frozenset([1]), "step": 3} for _ in range(2)]
    with pytest.warns(UserWarning, match="x"):
        files = files_of(tmp_path, states)
    assert count(files).differing == [group_of("x")]


# The manifest


def spread_manifest(tmp_path: Path) -> Manifest:
    return count(files_of(tmp_path, [{**spread(rank), "seed": rank} for rank in range(4)]))


def test_a_manifest_of_spread_tensors_is_decoded_as_it_was_encoded(tmp_path: Path) -> None:
    manifest = spread_manifest(tmp_path)
    assert manifest.differing == [group_of("seed")]
    assert decode_manifest(encode_manifest(manifest)) == manifest


def _tensor(**changes: Any) -> ShardedTensor:
    return msgspec.structs.replace(ShardedTensor("w", "float32", (4, 4), 0, ("R", "S(1)")), **changes)


@pytest.mark.parametrize(
    "tensors",
    [
        [_tensor(name="b"), _tensor(name="a")],
        [_tensor(), _tensor()],
        [_tensor(dtype="float31")],
        [_tensor(mesh=1)],
        [_tensor(placements=("R",))],
        [_tensor(placements=("R", "S(0)", "R"))],
        [_tensor(placements=("R", "P(sum)"))],
        [_tensor(placements=("R", "_S(0, 1)"))],
        [_tensor(placements=("R", "S(2)"))],
        [_tensor(shape=())],
        [_tensor(shape=(4, -4))],
        [_tensor(mesh=-1)],
    ],
    ids=str,
)
def test_a_manifest_of_tensors_that_cannot_be_is_refused(tmp_path: Path, tensors: list[ShardedTensor]) -> None:
    manifest = spread_manifest(tmp_path)
    allowed = msgspec.structs.replace(manifest, tensors=[_tensor()])
    assert decode_manifest(encode_manifest(allowed)) == allowed
    with pytest.raises(InvalidManifestError):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, tensors=tensors)))


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh((2, 2), None, (0, 1, 2, 4)),
        Mesh((2, 2), None, (0, 1, 2, 2)),
        Mesh((2, 2), None, (0, 1, 2)),
        Mesh((2, 2), ("data",), (0, 1, 2, 3)),
        Mesh((0, 2), None, ()),
        Mesh((2, 2), None, (0, 1, 2, -3)),
    ],
    ids=str,
)
def test_a_manifest_of_a_mesh_that_cannot_be_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    manifest = msgspec.structs.replace(spread_manifest(tmp_path), meshes=[mesh], tensors=[])
    with pytest.raises(InvalidManifestError):
        decode_manifest(encode_manifest(manifest))


def test_the_files_are_really_there(tmp_path: Path) -> None:
    """That the tests above speak of files and not of memory."""
    files_of(tmp_path, same(2))
    with closing(LocalStorage().open(checkpoint_file(str(tmp_path), 1))) as file:
        assert file.size == (tmp_path / "checkpoint_1.pt").stat().st_size


# Names


UNUSUAL_KEYS = [b"x", (1, 2), 10**30, float("inf"), "x\udc80", 2j, torch.float32]


@pytest.mark.parametrize("key", UNUSUAL_KEYS, ids=ascii)
def test_under_keys_that_files_print_in_other_words_nothing_spread_may_stand(key: Any) -> None:
    """The name decides who writes a small tensor: a reader that knew it under another would look in the wrong file."""
    with pytest.raises(UnsupportedStateError, match="Use strings or numbers"):
        Divider(RankInfo(0, 2), ["*"]).divide({"group": {key: torch.ones(3)}})
    assert Divider(RankInfo(0, 2), ["other"]).divide({"group": {key: torch.ones(3)}})


@pytest.mark.parametrize("key", ["", "a.b", 3, -1, True, 2.5, None], ids=ascii)
def test_whoever_writes_and_whoever_counts_call_a_tensor_the_same(tmp_path: Path, key: Any) -> None:
    """The name decides who writes a small tensor: a reader that knew it under another would look in the wrong file."""
    files = files_of(tmp_path, [{group: {key: torch.ones(3)} for group in "abcdefgh"} for _ in range(5)], ["*"])
    manifest = count(files)
    assert len(manifest.tensors) == 8
    for tensor in manifest.tensors:
        (piece,) = pieces_within(manifest.layout(tensor), whole(tensor.shape))
        found = [held_in(file, tensor.name) for file in files]
        assert found == [[piece.box] if rank == piece.rank else [] for rank in range(5)]


def test_what_stands_under_two_keys_is_the_same_on_ranks_that_hold_other_numbers_of_parts(tmp_path: Path) -> None:
    """Objects are numbered, and so are the parts of spread tensors: rank 1 holds none of the one row."""
    shared, mesh = torch.ones(2), Mesh((2,), None, (0, 1))
    states = [
        {"w": sharded("w", torch.ones(1), mesh, ["S(0)"], rank), "in": shared, "out": shared} for rank in range(2)
    ]
    assert count(files_of(tmp_path, states)).differing == []
    other = [{**state, "out": torch.ones(2)} for state in states[:1]] + states[1:]
    assert count(files_of(tmp_path, other)).differing == [group_of("out")]


def test_keys_that_are_no_strings_are_compared_as_they_stand_in_the_index(tmp_path: Path) -> None:
    states = [{("a", 1): rank, b"b": 0} for rank in range(2)]
    assert count(files_of(tmp_path, states)).differing == [group_of('["tuple",["a",1]]')]
