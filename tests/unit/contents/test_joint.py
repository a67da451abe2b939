"""The files of several ranks as one state: what is in it, and what ranks have of their own."""

from pathlib import Path
from typing import Any

import torch
from tests.helpers.saves import commit_together
from tests.helpers.sharded import USUAL, commit, model_state, row, save_spread, spread

from lastgood._contents import Contents, open_contents
from lastgood._contents.joint import JointState, is_joint, join, own_paths
from lastgood.format.mesh import Mesh
from lastgood.format.nodes import OrderedDictNode, ReferenceNode, ShardedNode, TensorNode, walk_paths


def own(contents: Contents) -> set[str]:
    assert contents.manifest is not None
    return own_paths(contents.files, contents.manifest)


def joined(contents: Contents) -> tuple[JointState, dict[str, Any]]:
    joint = join(contents.files)
    return joint, dict(walk_paths(joint.root))


def stage(number: int, rank: int) -> dict[str, Any]:
    """A stage of a pipeline: two ranks share its layer, and a list that is there under two keys."""
    mesh = Mesh((2,), None, (2 * number, 2 * number + 1))
    layer = {"w": torch.arange(6.0) + number, "step": torch.tensor(5.0 + number)}
    placements = {f"model.{number}.w": ["S(0)"]}
    state = spread({"model": {str(number): layer}}, mesh, placements, rank)
    shared = [number]
    return {**state, "epoch": 3, "rng": rank, f"a{number}": shared, f"b{number}": shared}


def test_values_that_differ_are_found_and_those_that_are_alike_are_not(tmp_path: Path) -> None:
    same = [1, 2]
    save_spread(
        tmp_path,
        model_state() | {"list": same, "again": same},
        row(3),
        USUAL,
        lambda rank: {"rng": torch.tensor([rank]), "loader": {"position": [0, rank], "epoch": 1}},
    )
    assert own(open_contents(str(tmp_path))) == {"rng", "loader.position[1]"}


def test_a_value_that_some_of_the_ranks_lack_is_their_own(tmp_path: Path) -> None:
    states = [spread(model_state(), row(2), USUAL, rank) | ({"only": 1} if rank else {}) for rank in range(2)]
    commit(tmp_path, states)
    contents = open_contents(str(tmp_path))
    assert own(contents) == {"only"}
    assert joined(contents)[1]["only"] == 1


def test_stages_of_a_pipeline_are_one_state_and_what_each_has_is_not_its_own(tmp_path: Path) -> None:
    commit(tmp_path, [stage(rank // 2, rank) for rank in range(4)])
    contents = open_contents(str(tmp_path))
    assert own(contents) == {"rng"}
    joint, paths = joined(contents)
    assert isinstance(paths["model.0.w"], ShardedNode)
    assert isinstance(paths["model.1.w"], ShardedNode)
    assert [joint.rank(paths[f"model.{number}.step"]) for number in range(2)] == [0, 2]
    assert isinstance(paths["b1"], ReferenceNode)
    assert joint.first_path(paths["b1"]) == "a1"


def test_references_lead_to_tensors_of_the_file_that_they_stand_in(tmp_path: Path) -> None:
    def state(rank: int) -> dict[str, Any]:
        tensor = torch.arange(3) + rank
        return {f"a{rank}": tensor, f"b{rank}": tensor}

    commit(tmp_path, [state(0), state(1)])
    joint, paths = joined(open_contents(str(tmp_path)))
    found = joint.tensor(paths["b1"])
    assert isinstance(found, TensorNode)
    assert found is paths["a1"]
    assert joint.rank(found) == 1


def test_keys_of_any_kind_are_joined(tmp_path: Path) -> None:
    states: list[dict[str, Any]] = [
        {"x": {0: "zero", (1, 2): "pair"}},
        {"x": {0: "zero", 5: "five", "y": torch.ones(1)}},
    ]
    for rank, state in enumerate(states):
        state["ordered"] = torch.nn.Linear(1, 1, bias=bool(rank)).state_dict()
    commit(tmp_path, states)
    _, paths = joined(open_contents(str(tmp_path)))
    assert isinstance(paths["ordered"], OrderedDictNode)
    assert {"x.0", "x.5", "x.y", "ordered.weight", "ordered.bias"} <= paths.keys()
    assert paths["x.5"] == "five"


def test_ranks_that_did_not_vote_are_compared_value_by_value(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "c", 7) == [None, None]
    contents = open_contents(str(tmp_path / "c"))
    assert is_joint(contents)
    assert own(contents) == {"model.weights", "model.bias", "step"}


def test_a_file_that_the_manifest_does_not_name_is_noted(tmp_path: Path) -> None:
    save_spread(tmp_path, model_state(), row(2), USUAL)
    commit(tmp_path / "other", [model_state(2) | {"more": 1}] * 2)
    (tmp_path / "other" / "checkpoint_1.pt").rename(tmp_path / "checkpoint_1.pt")
    assert any(
        "checkpoint_1.pt is not the file that its manifest names" in note for note in open_contents(str(tmp_path)).notes
    )
    (tmp_path / "checkpoint_1.pt").unlink()
    contents = open_contents(str(tmp_path))
    assert "the files of the ranks 1 are not there" in contents.notes
    assert not is_joint(contents)
