"""Verifying checkpoints of several ranks: the files are those of the manifest, and hold just what it promises."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.helpers.sharded import USUAL, commit, model_state, publish, replace_file, row, save_spread, spread
from tests.unit.loading.files import archive_of, flip
from tests.unit.sharding.ballots import rank_file

from lastgood._contents import Problem, verify_checkpoint
from lastgood.format.manifest import Manifest, ShardedTensor
from lastgood.format.mesh import Mesh

OTHER_SAVE = "77" * 16


def problems(path: Path) -> list[Problem]:
    return list(verify_checkpoint(str(path)).problems)


def own(rank: int) -> dict[str, Any]:
    return {"rng": torch.tensor([rank]), "position": rank}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Manifest]:
    """Three ranks' checkpoint, with tied weights and values of each rank's own."""
    state = model_state()
    state["model"]["tied"] = state["model"]["w"]
    path = tmp_path / "c"
    return path, save_spread(path, state, row(3, "dp"), USUAL | {"model.tied": ["S(0)"]}, own)


def on(rank: int, placements: Any = USUAL, mesh: Mesh | None = None) -> Any:
    """What a rank holds, but for the tied weights."""
    return spread(model_state(), row(3, "dp") if mesh is None else mesh, placements, rank) | own(rank)


def test_whole_checkpoints_of_any_layout_are_good(saved: tuple[Path, Manifest], tmp_path: Path) -> None:
    report = verify_checkpoint(str(saved[0]))
    assert (report.is_good, report.files) == (True, 3)
    large = {"w": torch.zeros(1024, 1024), "unused": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    mesh = Mesh((2, 2), ("data", "tensor"), (3, 1, 0, 2))
    save_spread(tmp_path / "grid", large, mesh, {"w": ["_S(0, 2)", "S(0)"], "unused": ["R", "S(0)"]})
    save_spread(tmp_path / "half", large, mesh, {"w": ["R", "S(1)"], "scalar": ["R", "R"]})
    commit(tmp_path / "same", [{"model": large, "rank": rank} for rank in range(3)], ["model.*"])
    for name in ("grid", "half", "same"):
        assert problems(tmp_path / name) == []


def test_a_rank_that_holds_another_ones_parts_is_named_with_the_parts(tmp_path: Path) -> None:
    # Nobody who votes looks at the parts.
    commit(tmp_path, [on(0), on(0), on(2)])
    found = problems(tmp_path)
    file = str(tmp_path / "checkpoint_1.pt")
    assert {(problem.file, problem.tensor) for problem in found[:-1]} == {(file, "model.w"), (file, "model.b")}
    messages = [problem.message for problem in found]
    assert messages[2:4] == [
        "the part [10:20, 0:7] of the tensor 'model.w', which its manifest promises, is not there",
        "the part [0:10, 0:7] of the tensor 'model.w', which is here, its manifest promises elsewhere",
    ]
    assert "2 tensors are not there as a whole: model.b, model.w" in messages[-1]


def test_a_tensor_that_a_file_does_not_hold_is_named(saved: tuple[Path, Manifest]) -> None:
    path, manifest = saved
    replace_file(path, manifest, 1, on(1))
    found = problems(path)
    assert [(problem.file, problem.tensor) for problem in found] == [
        (str(path / "checkpoint_1.pt"), "model.tied"),
        (str(path / "manifest.json"), "model.tied"),
    ]
    assert "no part of the tensor 'model.tied'" in found[0].message


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda: on(1) | {"more": on(1)["model"]}, "'more.w', which its manifest does not know"),
        (lambda: on(1, mesh=row(3, "tp")), "on the mesh [3] (tp) of the ranks 0, 1, 2, its manifest on [3] (dp)"),
        (
            lambda: on(1, mesh=Mesh((3,), ("dp",), (0, 2, 1))),
            "on the mesh [3] (dp) of the ranks 0, 2, 1, its manifest on",
        ),
        (
            lambda: on(1, USUAL | {"model.w": ["S(1)"]}),
            "S(1) over mesh [3] (dp), its manifest as float32 [30, 7], S(0)",
        ),
    ],
    ids=["a tensor too many", "names of a mesh", "ranks of a mesh", "a placement"],
)
def test_what_a_file_describes_otherwise_than_its_manifest_is_said(
    tmp_path: Path, state: Callable[[], Any], said: str
) -> None:
    manifest = commit(tmp_path, [on(0), on(1), on(2)])
    replace_file(tmp_path, manifest, 1, state())
    found = problems(tmp_path)
    assert found[0].file == str(tmp_path / "checkpoint_1.pt")
    assert any(said in problem.message for problem in found), found


# Files and manifests that do not belong together


def test_a_file_of_another_save_is_named(saved: tuple[Path, Manifest]) -> None:
    path, _ = saved
    rank_file(path, 2, 3, on(2), save_id=OTHER_SAVE, voted_save=OTHER_SAVE)
    first, whole = problems(path)
    assert (first.file, "belongs to another save" in first.message) == (str(path / "checkpoint_2.pt"), True)
    assert "3 tensors are not there as a whole" in whole.message


def test_a_file_of_another_number_of_ranks_is_named(saved: tuple[Path, Manifest]) -> None:
    path, _ = saved
    rank_file(path, 1, 4, on(1))
    assert problems(path)[0].message == "it is one of 4 ranks', its manifest names 3"


def test_a_file_that_is_missing_tells_what_is_not_whole(saved: tuple[Path, Manifest]) -> None:
    path, _ = saved
    (path / "checkpoint_0.pt").unlink()
    first, whole = problems(path)
    assert (first.file, first.message) == (str(path / "checkpoint_0.pt"), "the file is not there")
    assert "3 tensors are not there as a whole: model.b, model.tied, model.w" in whole.message


EDITS: dict[str, Callable[[Manifest], dict[str, Any]]] = {
    "of the save": lambda manifest: {"save_id": OTHER_SAVE},
    "its manifest as bfloat16 [12]": lambda manifest: {
        "tensors": [ShardedTensor("model.b", "bfloat16", (12,), 0, ("S(0)",)), *manifest.tensors[1:]]
    },
    "'model.b', which its manifest does not know": lambda manifest: {"tensors": manifest.tensors[1:]},
    "no part of the tensor 'model.z'": lambda manifest: {
        "tensors": [*manifest.tensors, ShardedTensor("model.z", "int8", (3,), 0, ("S(0)",))]
    },
    "its manifest on [3] (dp) of the ranks 0, 2, 1": lambda manifest: {"meshes": [Mesh((3,), ("dp",), (0, 2, 1))]},
    "it has other differing": lambda manifest: {"differing": []},
    "it has other meshes": lambda manifest: {"meshes": [*manifest.meshes, row(2)]},
}


@pytest.mark.parametrize("said", EDITS)
def test_a_manifest_that_was_edited_is_found_out_though_its_checksum_is_right(
    saved: tuple[Path, Manifest], said: str
) -> None:
    path, manifest = saved
    publish(path, msgspec.structs.replace(manifest, **EDITS[said](manifest)))
    assert any(said in problem.message for problem in problems(path)), problems(path)


def test_a_flipped_bit_is_named_with_the_tensor_and_the_file(saved: tuple[Path, Manifest]) -> None:
    path, _ = saved
    file = path / "checkpoint_1.pt"
    with archive_of(file) as archive:
        (record,) = (each for each in archive.layout.storages if each.size == math.prod((10, 7)) * 4)
    flip(file, record.data_offset + 100)
    (found,) = problems(path)
    assert (found.file, found.tensor) == (str(file), "model.w")
    assert "'model.w'" in found.message
