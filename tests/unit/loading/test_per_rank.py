"""Values that each rank has of its own: which rank gets which when another number of ranks loads.

The files are those of ranks that were never started; that real ones write the same is shown elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.matrix_files import flip_byte_of
from tests.unit.sharding.ballots import count, files_of, sharded

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import ConfigError, CorruptCheckpointError, RankMismatchError, TargetMismatchError
from lastgood.format.manifest import Manifest, checkpoint_file, encode_manifest, manifest_file
from lastgood.format.mesh import Mesh
from lastgood.format.vote import group_of
from lastgood.types import RankInfo

ALL = Mesh((3,), None, (0, 1, 2))
WEIGHT = torch.arange(35.0).view(7, 5)


def commit(path: Path, states: Sequence[Any]) -> Manifest:
    """Files of ranks that hold these states, and their manifest."""
    manifest = count(files_of(path, states))
    Path(manifest_file(str(path))).write_bytes(encode_manifest(manifest))
    return manifest


def rank_state(rank: int, mesh: Mesh = ALL) -> dict[str, Any]:
    """A tensor that is spread over three ranks, what they have alike, and what each has of its own."""
    return {
        "model": {"weight": sharded("model.weight", WEIGHT, mesh, ("S(0)",), rank), "bias": torch.ones(3)},
        "random": {"cpu": torch.tensor([rank, 10]), "device": [rank, "philox"]},
        "loader": {"position": 100 + rank, "epoch": 4},
        "step": 7,
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of three ranks."""
    path = tmp_path_factory.mktemp("three")
    commit(path, [rank_state(rank) for rank in range(3)])
    return path


def read(path: Path, rank: int, world_size: int, target: Any = None, **options: Any) -> tuple[Any, list[str]]:
    return CheckpointReader(RankInfo(rank, world_size)).read(str(path), target, **options)


def target() -> dict[str, Any]:
    """For all of it."""
    return {
        "model": {"weight": torch.zeros(7, 5), "bias": torch.zeros(3)},
        "random": {"cpu": torch.zeros(2, dtype=torch.int64), "device": None},
        "loader": {"position": -1, "epoch": -1},
        "step": -1,
    }


RULES = {"random": "modulo", "loader.position": "first"}


# The same number of ranks


@pytest.mark.parametrize("rank", range(3))
def test_with_the_same_number_of_ranks_each_gets_its_own(three: Path, rank: int) -> None:
    for wanted in (None, target()):
        found, missing = read(three, rank, 3, wanted)
        assert missing == []
        assert found["random"]["cpu"].tolist() == [rank, 10]
        assert (found["random"]["device"], found["loader"]) == ([rank, "philox"], {"position": 100 + rank, "epoch": 4})
        assert torch.equal(found["model"]["weight"], WEIGHT)


def test_rules_are_for_another_number_of_ranks(three: Path) -> None:
    found, _ = read(three, 2, 3, per_rank={"*": "first"})
    assert found["loader"]["position"] == 102


# Another number of ranks


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_without_a_rule_the_error_names_the_values_and_nothing_is_changed(three: Path, world_size: int) -> None:
    wanted = target()
    for given in (None, wanted):
        with pytest.raises(RankMismatchError, match="saved by 3 ranks") as caught:
            read(three, world_size - 1, world_size, given)
        message = str(caught.value)
        for name in ("random.cpu", "random.device[0]", "loader.position"):
            assert name in message
        for name in ("model", "epoch", "step", "device[1]"):
            assert name not in message
        assert "Nothing has been changed" in message
        assert "per_rank={" in message
    assert wanted["step"] == -1
    assert not wanted["model"]["weight"].any()


def test_values_that_are_the_same_everywhere_need_no_rule(three: Path) -> None:
    wanted = {"model": target()["model"], "loader": {"epoch": None}, "step": None}
    found, missing = read(three, 0, 1, wanted)
    assert missing == []
    assert (found["loader"]["epoch"], found["step"]) == (4, 7)
    assert torch.equal(found["model"]["weight"], WEIGHT)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (4, 5)])
@pytest.mark.parametrize("given", [False, True])
def test_first_and_modulo(three: Path, rank: int, world_size: int, given: bool) -> None:
    wanted = target() if given else None
    cpu = None if wanted is None else wanted["random"]["cpu"]
    found, missing = read(three, rank, world_size, wanted, per_rank=RULES)
    assert missing == []
    assert found["random"]["cpu"].tolist() == [rank % 3, 10]
    assert found["random"]["device"] == [rank % 3, "philox"]
    assert found["loader"] == {"position": 100, "epoch": 4}
    assert found["step"] == 7
    assert torch.equal(found["model"]["weight"], WEIGHT)
    assert cpu is None or found["random"]["cpu"] is cpu


def test_leave_keeps_what_is_there_and_counts_as_missing(three: Path) -> None:
    wanted = target()
    found, missing = read(three, 0, 1, wanted, per_rank={"random": "leave", "loader*": "leave"})
    assert found is wanted
    assert sorted(missing) == ["loader", "random"]
    assert (found["loader"], found["random"]["device"]) == ({"position": -1, "epoch": -1}, None)
    assert found["step"] == 7
    whole, missing = read(three, 0, 1, per_rank={"random": "leave", "loader.position": "leave"})
    assert sorted(missing) == ["loader.position", "random"]
    assert "random" not in whole
    assert whole["loader"] == {"epoch": 4}


@pytest.mark.parametrize("given", [False, True])
def test_a_function_makes_one_of_all(three: Path, given: bool) -> None:
    asked: list[tuple[list[int], RankInfo]] = []

    def furthest(values: list[int], rank_info: RankInfo) -> int:
        asked.append((values, rank_info))
        return max(values)

    rules: Any = {"random": "first", "loader.position": furthest}
    found, _ = read(three, 1, 2, target() if given else None, per_rank=rules)
    assert found["loader"] == {"position": 102, "epoch": 4}
    assert asked == [([100, 101, 102], RankInfo(1, 2))]


def test_a_pattern_covers_all_that_is_below_what_it_matches(three: Path) -> None:
    for pattern in ("random", "rand*", "random.cpu", "*cpu"):
        rules: Any = {pattern: "first", "loader": "first"}
        found, _ = read(three, 0, 1, {"random": {"cpu": None}, "loader": None}, per_rank=rules)
        assert found["random"]["cpu"].tolist() == [0, 10]
        assert found["loader"] == {"position": 100, "epoch": 4}


def test_a_rule_inside_of_what_is_wanted_as_a_whole(three: Path) -> None:
    """``None`` asks for all of a dict, of which a rule decides a part."""
    rules: Any = {"loader.position": "first", "random.*": "modulo"}
    found, missing = read(three, 1, 2, {"loader": None, "random": None}, per_rank=rules)
    assert missing == []
    assert found["loader"] == {"position": 100, "epoch": 4}
    assert (found["random"]["cpu"].tolist(), found["random"]["device"]) == ([1, 10], [1, "philox"])


def test_the_first_pattern_that_matches_counts(three: Path) -> None:
    rules: Any = {"random.cpu": "modulo", "random": "first", "*": "first"}
    found, _ = read(three, 1, 2, per_rank=rules)
    assert found["loader"]["position"] == 100
    assert found["random"]["device"][0] == 0


def test_a_rule_inside_of_a_list_covers_the_list(tmp_path: Path) -> None:
    """Lists are not taken apart: the items of one come from one rank."""
    commit(tmp_path, [{"workers": [5, rank, 10 * rank], "step": 7} for rank in range(3)])
    equal_rules: Any = {"workers[[]1]": "modulo", "workers[[]2]": "".join(["mod", "ulo"])}
    found, _ = read(tmp_path, 1, 2, per_rank=equal_rules)
    assert found["workers"] == [5, 1, 10]
    with pytest.raises(RankMismatchError, match=r"workers\[2\]"):
        read(tmp_path, 1, 2, per_rank={"workers[[]1]": "modulo"})


def test_lists_of_different_lengths_need_a_rule(tmp_path: Path) -> None:
    commit(tmp_path, [{"seen": list(range(2 + rank))} for rank in range(3)])
    with pytest.raises(RankMismatchError, match="seen"):
        read(tmp_path, 0, 1)


def test_a_key_that_only_another_rank_has_needs_a_rule(tmp_path: Path) -> None:
    commit(tmp_path, [{"step": 1}, {"step": 1, "writer": {"position": 5}}])
    with pytest.raises(RankMismatchError, match=r"writer\.position"):
        read(tmp_path, 0, 1)


def test_a_value_whose_group_collides_with_a_differing_one_needs_no_rule(tmp_path: Path) -> None:
    own = "own"
    same = next(name for name in (f"same-{number}" for number in range(100_000)) if group_of(name) == group_of(own))
    manifest = commit(tmp_path, [{own: rank, same: 5} for rank in range(3)])
    assert manifest.differing == [group_of(own)]
    found, missing = read(tmp_path, 0, 1, {same: None})
    assert (found, missing) == ({same: 5}, [])
    with pytest.raises(RankMismatchError) as caught:
        read(tmp_path, 0, 1)
    assert same not in str(caught.value)


@pytest.mark.parametrize("rules", [{"random": "second"}, {"random": None}, {3: "first"}, ["random"], "first"])
def test_what_is_no_rule_is_refused(three: Path, rules: Any) -> None:
    with pytest.raises(ConfigError, match=r"per_rank"):
        read(three, 0, 1, per_rank=rules)


@pytest.mark.parametrize("rule", ["first", "modulo"])
def test_a_target_that_does_not_fit_a_chosen_value_changes_nothing(three: Path, rule: str) -> None:
    wanted = target()
    wanted["random"]["cpu"] = torch.zeros(3, dtype=torch.int64)
    rules: Any = {"random": rule, "loader": "leave"}
    with pytest.raises(TargetMismatchError, match=r"random\.cpu"):
        read(three, 0, 1, wanted, per_rank=rules)
    assert wanted["step"] == -1
    assert not wanted["model"]["weight"].any()


def test_verify_first_checks_the_files_of_chosen_values_before_anything_is_changed(tmp_path: Path) -> None:
    commit(tmp_path, [{"own": torch.full((50,), rank), "same": torch.ones(50)} for rank in range(3)])
    flip_byte_of(Path(checkpoint_file(str(tmp_path), 0)), "own")
    wanted = {"own": torch.zeros(50, dtype=torch.int64), "same": torch.zeros(50)}
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_0\.pt"):
        read(tmp_path, 1, 2, wanted, per_rank={"own": "first"}, verify_first=True)
    assert not wanted["same"].any()


# Spread tensors in one process


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first")])
def test_of_tied_targets_the_last_one_wins_although_their_values_lie_in_several_files(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    values = {"first": torch.full((9, 4), 1.0), "second": torch.full((9, 4), 2.0)}
    placements = {"first": ("S(0)",), "second": ("S(1)",)}
    commit(
        tmp_path,
        [{name: sharded(name, values[name], ALL, placements[name], rank) for name in values} for rank in range(3)],
    )
    tied = torch.zeros(9, 4)
    read(tmp_path, 0, 1, dict.fromkeys(names, tied))
    assert torch.equal(tied, values[names[1]])


def test_the_manifest_is_believed_also_where_none_was_asked_for(three: Path) -> None:
    wanted = {"model": {"weight": torch.zeros(7, 5)}}
    read(three, 1, 3, wanted, allow_uncommitted=True)
    assert torch.equal(wanted["model"]["weight"], WEIGHT)


def test_meta_tensors_take_no_memory(three: Path) -> None:
    found, _ = read(three, 0, 1, {"model": None}, map_location="meta")
    assert found["model"]["weight"].is_meta
    assert found["model"]["weight"].shape == (7, 5)
