"""A pipeline: ranks of different stages hold different keys, and whoever loads may want those of any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed import matrix_states
from tests.distributed.matrix_files import flip_byte_of
from tests.distributed.matrix_pool import Pool
from tests.unit.sharding.ballots import count, files_of, sharded

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import CorruptCheckpointError, MissingKeysError, RankMismatchError, TargetMismatchError
from lastgood.format.manifest import checkpoint_file, encode_manifest, manifest_file
from lastgood.format.mesh import Mesh
from lastgood.types import RankInfo

STAGES = [Mesh((2,), ("dp",), (0, 1)), Mesh((2,), ("dp",), (2, 3))]
WEIGHTS = [torch.arange(21.0).view(7, 3), torch.arange(10.0).view(5, 2) + 100]


def stage_state(rank: int) -> dict[str, Any]:
    """The layers of one of two stages, which are divided between two ranks each, and what all ranks have alike."""
    stage = rank // 2
    name = f"layers.{stage}.weight"
    return {
        "layers": {str(stage): {"weight": sharded(name, WEIGHTS[stage], STAGES[stage], ("S(0)",), rank)}},
        "optim": {f"steps-{stage}": {"count": torch.tensor(7.0 + stage)}, "lr": 0.5},
        "step": 3,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    manifest = count(files_of(tmp_path, [stage_state(rank) for rank in range(4)]))
    Path(manifest_file(str(tmp_path))).write_bytes(encode_manifest(manifest))
    return tmp_path


def read(path: Path, rank: int, world_size: int, target: Any = None, **options: Any) -> tuple[Any, list[str]]:
    return CheckpointReader(RankInfo(rank, world_size)).read(str(path), target, **options)


def assert_union(found: dict[str, Any]) -> None:
    """Both stages are there, once each."""
    assert found.keys() == {"layers", "optim", "step"}
    assert found["layers"].keys() == {"0", "1"}
    for stage, weight in enumerate(WEIGHTS):
        assert torch.equal(found["layers"][str(stage)]["weight"], weight)
        assert found["optim"][f"steps-{stage}"]["count"].item() == 7 + stage
    assert (found["optim"]["lr"], found["step"]) == (0.5, 3)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3), (1, 8)])
def test_another_number_of_ranks_gets_all_stages_without_a_rule(saved: Path, rank: int, world_size: int) -> None:
    """A value that only one stage has is not one that ranks have in different ways."""
    found, missing = read(saved, rank, world_size)
    assert missing == []
    assert_union(found)


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_can_have_the_keys_of_the_other_stage(saved: Path, rank: int) -> None:
    other = 1 - rank // 2
    weight = torch.zeros_like(WEIGHTS[other])
    wanted = {"layers": {str(other): {"weight": weight}}, "optim": {f"steps-{other}": None}, "step": None}
    found, missing = read(saved, rank, 4, wanted)
    assert (found, missing) == (wanted, [])
    assert found["layers"][str(other)]["weight"] is weight
    assert torch.equal(weight, WEIGHTS[other])
    assert found["optim"][f"steps-{other}"]["count"].item() == 7 + other


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_key_that_no_stage_has_is_missing_although_its_neighbours_come_from_another_file(
    saved: Path, world_size: int
) -> None:
    wanted = {"layers": {"0": None, "1": {"weight": None, "bias": torch.zeros(3)}, "2": None}, "step": None}
    found, missing = read(saved, 0, world_size, wanted)
    assert sorted(missing) == ["layers.1.bias", "layers.2"]
    assert torch.equal(found["layers"]["1"]["weight"], WEIGHTS[1])
    assert found["step"] == 3


def test_check_keys_hears_of_what_no_file_holds_before_anything_is_changed(saved: Path) -> None:
    class Refused(Exception):
        pass

    heard: list[list[str]] = []

    def refuse(missing: list[str], unread: list[str]) -> None:
        heard.append(sorted(missing))
        raise Refused

    wanted = {"layers": {"1": {"weight": torch.zeros(5, 2), "bias": torch.zeros(3)}}, "step": -1}
    with pytest.raises(Refused):
        read(saved, 0, 1, wanted, check_keys=refuse)
    assert heard == [["layers.1.bias"]]
    assert wanted["step"] == -1


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_target_of_another_stage_that_does_not_fit_changes_nothing(saved: Path, world_size: int) -> None:
    mine = torch.zeros(7, 3)
    wanted = {"layers": {"0": {"weight": mine}, "1": {"weight": torch.zeros(2, 5)}}, "step": -1}
    with pytest.raises(TargetMismatchError, match=r"layers\.1\.weight"):
        read(saved, 0, world_size, wanted)
    assert wanted["step"] == -1
    assert not mine.any()


@pytest.mark.parametrize("damaged", [2, 3])
def test_verify_first_checks_the_files_of_other_stages_before_anything_is_changed(saved: Path, damaged: int) -> None:
    flip_byte_of(Path(checkpoint_file(str(saved), damaged)), "layers.1.weight")
    mine = torch.zeros(7, 3)
    wanted = {"layers": {"0": {"weight": mine}, "1": {"weight": torch.zeros(5, 2)}}}
    with pytest.raises(CorruptCheckpointError, match=rf"checkpoint_{damaged}\.pt.*layers\.1\.weight"):
        read(saved, 0, 1, wanted, verify_first=True)
    assert not mine.any()


def test_a_value_that_a_rank_of_the_same_stage_lacks_needs_a_rule(tmp_path: Path) -> None:
    states = [stage_state(rank) for rank in range(4)]
    states[0]["leader"] = {"address": "a"}
    manifest = count(files_of(tmp_path, states))
    Path(manifest_file(str(tmp_path))).write_bytes(encode_manifest(manifest))
    with pytest.raises(RankMismatchError, match=r"leader\.address"):
        read(tmp_path, 0, 1)
    found, _ = read(tmp_path, 0, 1, per_rank={"leader": "first"})
    assert found["leader"] == {"address": "a"}


@pytest.fixture
def with_loaders(tmp_path: Path) -> Path:
    """Stages of which the second one has values that its ranks have in different ways."""
    states = [stage_state(rank) for rank in range(4)]
    for rank in (2, 3):
        states[rank]["loader"] = {"position": 10 * rank, "kind": "a"}
    manifest = count(files_of(tmp_path, states))
    Path(manifest_file(str(tmp_path))).write_bytes(encode_manifest(manifest))
    return tmp_path


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3), (0, 4)])
def test_a_value_that_ranks_of_another_stage_have_in_different_ways_needs_a_rule(
    with_loaders: Path, rank: int, world_size: int
) -> None:
    wanted = {"loader": None, "step": -1}
    with pytest.raises(RankMismatchError, match=r"loader\.position") as caught:
        read(with_loaders, rank, world_size, wanted)
    assert "loader.kind" not in str(caught.value)
    assert wanted["step"] == -1


@pytest.mark.parametrize(
    ("rule", "rank", "world_size", "position"),
    [
        ("first", 0, 1, 20),
        ("first", 2, 3, 20),
        ("modulo", 0, 5, 20),
        ("modulo", 1, 5, 30),
        ("modulo", 3, 5, 30),
        (lambda values, rank_info: values, 0, 1, [None, None, 20, 30]),
    ],
)
def test_a_rule_for_a_value_of_one_stage_is_about_its_ranks(
    with_loaders: Path, rule: Any, rank: int, world_size: int, position: Any
) -> None:
    for wanted in (None, {"loader": None}, {"loader": {"position": 0, "kind": ""}}):
        for pattern in ("loader", "loader.position"):
            if callable(rule) and pattern == "loader":
                continue
            found, missing = read(with_loaders, rank, world_size, wanted, per_rank={pattern: rule})
            assert missing == []
            assert found["loader"] == {"position": position, "kind": "a"}


def test_what_is_left_of_a_stage_is_missing(with_loaders: Path) -> None:
    found, missing = read(with_loaders, 0, 1, {"loader": None, "step": None}, per_rank={"loader": "leave"})
    assert (found, missing) == ({"loader": None, "step": 3}, ["loader"])


# Real ranks


def test_stages_that_are_swapped_load_each_others_state(pool: Pool, tmp_path: Path) -> None:
    four = pool.ranks(4)
    four.call(matrix_states.save_stages, str(tmp_path / "four"))
    four.call(matrix_states.load_stages, str(tmp_path / "four"), True)
    four.call(matrix_states.load_stages, str(tmp_path / "four"), False)
    pool.alone().call(matrix_states.load_all_stages, str(tmp_path / "four"))
    pool.ranks(2).call(matrix_states.load_all_stages, str(tmp_path / "four"))


def test_strict_names_a_key_that_no_stage_has(pool: Pool, tmp_path: Path) -> None:
    four = pool.ranks(4)
    four.call(matrix_states.save_stages, str(tmp_path / "four"))
    with pytest.raises(MissingKeysError, match=r"missing keys: \['stage2'\]"):
        four.call(matrix_states.load_strictly, str(tmp_path / "four"), "stage2")
