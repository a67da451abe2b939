"""The command on checkpoints whose tensors are spread over ranks: each is one tensor, whatever its layout is."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.cli.commands import NOTING_TORCH, assert_one_line_of_error, run, run_here, save_steps
from tests.helpers.sharded import USUAL, commit, model_state, row, save_spread, spread
from tests.unit.loading.files import CountingFile, archive_of, flip

import lastgood
from lastgood._contents import open_contents
from lastgood.cli import _compare, _stats
from lastgood.cli._compare import compare_states
from lastgood.cli._report.space import space_of
from lastgood.cli._whole import WholeSource
from lastgood.errors import CorruptCheckpointError
from lastgood.format.epoch import EPOCH_NAME, publishing, read_epoch, take_epoch
from lastgood.format.mesh import Mesh
from lastgood.storage.local import LocalStorage

GRID = Mesh((2, 2), ("data", "tensor"), (2, 0, 3, 1))
LAYOUTS: list[tuple[Mesh, dict[str, list[str]]]] = [
    (row(2), {"model.w": ["S(1)"], "model.scale": ["R"]}),
    (GRID, {"model.w": ["_S(0, 2)", "S(0)"], "model.b": ["R", "S(0)"], "model.scale": ["R", "R"]}),
    (row(5), {"model.w": ["S(0)"], "model.b": ["S(0)"], "model.scale": ["S(0)"]}),
]


def own(rank: int) -> dict[str, Any]:
    return {"rng": torch.tensor([rank]), "loader": {"position": 10 * rank}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranks' checkpoint with tied weights, and values of each rank's own."""
    path = tmp_path_factory.mktemp("sharded") / "step-10"
    state = model_state()
    state["model"]["tied"] = state["model"]["w"]
    save_spread(path, state, row(3, "dp"), USUAL | {"model.tied": ["S(0)"]}, own)
    return path


def printed(*words: str | Path) -> str:
    done = run_here(*map(str, words))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def document(*words: str | Path) -> Any:
    return json.loads(printed(*words, "--json"))


def line_of(output: str, key: str) -> str:
    (line,) = (line for line in output.splitlines() if line.split("  ")[0] == key)
    return " ".join(line.split())


# Looking into one


def test_each_spread_tensor_has_one_line_with_its_global_shape(saved: Path) -> None:
    output = printed("inspect", saved)
    assert line_of(output, "model.w") == "model.w float32 [30, 7] 840 bytes 0-2 S(0) over mesh [3] (dp)"
    assert line_of(output, "model.tied").endswith("S(0) over mesh [3] (dp), shares memory with model.w")
    assert line_of(output, "model.scale") == "model.scale float32 [3] 12 bytes 0-2"
    assert line_of(output, "rng").endswith("0-2 differs between ranks")
    assert "rank 1 of 3, 2 parts of 3 spread tensors (288 bytes)" in output
    assert "8 tensors (2 of them spread over ranks, 862 bytes in all)" in output
    assert "2 values are not the same on all ranks" in output
    assert "model.w[0]" not in output


def test_scripts_learn_how_tensors_are_spread(saved: Path) -> None:
    found = document("inspect", saved)
    keys = {entry["path"]: entry for entry in found["keys"] if entry["path"] != "loader.position"}
    assert keys["model.w"]["placements"] == ["S(0)"]
    assert keys["model.w"]["mesh"] == {"shape": [3], "names": ["dp"], "ranks": [0, 1, 2]}
    assert (keys["model.w"]["shape"], keys["model.w"]["nbytes"]) == ([30, 7], 840)
    assert keys["rng"]["differs"] is True
    assert "differs" not in keys["epoch"]
    assert found["totals"]["sharded_nbytes"] == 862
    assert [file["sharded"]["nbytes"] for file in found["files"]] == [288, 288, 286]
    assert found["committed_together"] is True


def test_one_ranks_file_shows_its_parts_with_their_boxes(saved: Path) -> None:
    output = printed("inspect", saved / "checkpoint_1.pt")
    assert line_of(output, "model.w") == "model.w float32 [30, 7] 840 bytes S(0) over mesh [3] (dp)"
    assert line_of(output, "model.w[0]") == "model.w[0] float32 [10, 7] 280 bytes the part [10:20, 0:7]"
    (part,) = (
        entry for entry in document("inspect", saved / "checkpoint_1.pt")["keys"] if entry["path"] == "model.b[0]"
    )
    assert (part["offsets"], part["shape"]) == ([4], [4])


def test_torch_is_not_imported_to_look_and_to_verify(saved: Path) -> None:
    for verb in ("inspect", "verify"):
        done = run(verb, saved, program=NOTING_TORCH)
        assert (done.returncode, done.stderr) == (0, "torch imported: False\n")


def test_statistics_are_those_of_whole_tensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stats, "_PIECE_ELEMENTS", 50)
    monkeypatch.setattr(_stats, "BATCH_ELEMENTS", 20)
    keys = [entry for entry in document("inspect", saved, "--stats")["keys"] if entry["path"] == "model.w"]
    weight = model_state()["model"]["w"].double()
    (stats,) = (entry["stats"] for entry in keys)
    assert stats["mean"] == pytest.approx(float(weight.mean()))
    assert stats["std"] == pytest.approx(float(weight.std(correction=0)))
    assert stats["max"] == float(weight.max())


def test_declared_replicas_are_called_the_same_on_all_ranks(tmp_path: Path) -> None:
    commit(tmp_path, [model_state()] * 2, ["model.*"])
    assert line_of(printed("inspect", tmp_path), "model.w").endswith("the same on all 2 ranks")


# One value


def test_a_spread_tensor_is_printed_and_saved_whole(saved: Path, tmp_path: Path) -> None:
    weight = model_state()["model"]["w"]
    found = document("cat", saved, "model.w")
    assert (found["shape"], found["rank"], found["path"]) == ([30, 7], None, str(saved))
    assert torch.equal(torch.tensor(found["value"]), weight)
    printed("cat", saved, "model.w", "-o", tmp_path / "w.npy")
    assert numpy.array_equal(numpy.load(tmp_path / "w.npy"), weight.numpy())
    printed("cat", saved, "model", "-o", tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["w"], weight)


def test_spread_tensors_in_lists_and_under_keys_of_any_kind_are_found(tmp_path: Path) -> None:
    tensors = [torch.arange(6.0), torch.arange(8.0)]
    state = {"layers": list(tensors), "by number": {7: tensors[0], (1, 2): tensors[1]}}
    places = {"layers[0]": ["S(0)"], "layers[1]": ["S(0)"], "by number.7": ["S(0)"], "by number.(1, 2)": ["S(0)"]}
    save_spread(tmp_path, state, row(2), places)
    for key, number in (("layers[1]", 1), ("by number.7", 0)):
        assert document("cat", tmp_path, key)["value"] == tensors[number].tolist()
    printed("cat", tmp_path, "layers", "-o", tmp_path / "layers.pt")
    assert torch.equal(torch.load(tmp_path / "layers.pt")[1], tensors[1])


def test_what_ranks_have_of_their_own_is_printed_of_the_one_that_is_named(saved: Path) -> None:
    assert printed("cat", saved, "loader.position") == "0\n"
    assert printed("cat", saved, "loader.position", "--rank", "2") == "20\n"


def test_of_one_ranks_file_the_parts_are_shown(saved: Path, tmp_path: Path) -> None:
    output = printed("cat", saved, "model.w", "--rank", "1")
    assert "S(0) over mesh [3] (dp), of which rank 1 has" in output
    assert line_of(output, "model.w[0]") == "model.w[0] tensor the part [10:20, 0:7]"
    part = document("cat", saved / "checkpoint_1.pt", "model.w[0]")["value"]
    assert torch.equal(torch.tensor(part), model_state()["model"]["w"][10:20])
    done = run("cat", saved, "model.w", "--rank", "1", "-o", tmp_path / "w.pt")
    assert_one_line_of_error(done, 2, "only a part", "model.w[0]")


def test_only_the_parts_that_are_wanted_are_read(tmp_path: Path) -> None:
    state = {"a": torch.rand(4000, 250), "b": torch.rand(4000, 250)}
    save_spread(tmp_path, state, row(2), {"a": ["S(0)"], "b": ["S(0)"]})
    with WholeSource(str(tmp_path)) as source:
        counting = [CountingFile(source.rank_source(rank)._file) for rank in range(2)]
        for rank, file in enumerate(counting):
            object.__setattr__(source._archive(rank), "file", file)
        loaded = source.load({"a": None})
        assert torch.equal(loaded["a"], state["a"])
        assert 4_000_000 <= sum(file.bytes_read for file in counting) < 4_500_000


# Comparing


def plain_difference(a: Any, b: Any, path: Path) -> Any:
    for name, state in (("a", a), ("b", b)):
        lastgood.save(state, path / f"{name}.pt")
    return compare_states(str(path / "a.pt"), str(path / "b.pt"))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("mesh", "placements"), LAYOUTS, ids=["columns", "grid", "rows"])
def test_states_are_compared_whatever_their_layouts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng_seed: int, mesh: Mesh, placements: Any, pieces: bool
) -> None:
    if pieces:
        monkeypatch.setattr(_compare, "_PIECE_ELEMENTS", 20)
        monkeypatch.setattr(_compare, "BATCH_ELEMENTS", 10)
    a, b = model_state(rng_seed), model_state(rng_seed)
    chosen = random.Random(rng_seed)
    save_spread(tmp_path / "a", a, row(3), USUAL)
    save_spread(tmp_path / "same", b, mesh, placements)
    assert compare_states(str(tmp_path / "a"), str(tmp_path / "same")).is_equal
    b["model"]["w"].view(-1)[chosen.randrange(210)] += 1
    b["model"]["b"][chosen.randrange(11)] = float("nan")
    save_spread(tmp_path / "b", b, mesh, placements)
    found = compare_states(str(tmp_path / "a"), str(tmp_path / "b"))
    expected = plain_difference(a, b, tmp_path)
    assert {tensor.path: tensor.changed for tensor in found.tensors} == {"model.w": 1, "model.b": 1, "model.scale": 0}
    for tensor, other in zip(found.tensors, expected.tensors, strict=True):
        assert (tensor.path, tensor.changed, tensor.nan_in_one) == (other.path, other.changed, other.nan_in_one)
        assert tensor.rms_change == pytest.approx(other.rms_change)
    # And with a plain file of the one or the other.
    assert compare_states(str(tmp_path / "a"), str(tmp_path / "a.pt")).is_equal
    assert not compare_states(str(tmp_path / "a.pt"), str(tmp_path / "b")).is_equal


def test_values_of_ranks_own_are_compared_with_those_of_the_same_rank(saved: Path, tmp_path: Path) -> None:
    def other(rank: int) -> dict[str, Any]:
        return own(rank) if rank < 2 else {"rng": torch.tensor([7]), "loader": {"position": 20}}

    state = model_state()
    state["model"]["tied"] = state["model"]["w"]
    save_spread(tmp_path / "b", state, row(3), {"model.w": ["S(1)"]}, other)
    found = compare_states(str(saved), str(tmp_path / "b"))
    assert [tensor.path for tensor in found.tensors if not tensor.equal] == ["rank 2: rng"]
    assert not found.changed_values
    save_spread(tmp_path / "two", state, row(2), {"model.w": ["S(1)"]}, own)
    found = compare_states(str(saved), str(tmp_path / "two"))
    assert sorted(found.only_in_a) == ["rank 2: loader.position", "rank 2: rng"]
    assert not found.only_in_b


def test_files_of_single_ranks_are_compared_part_by_part(saved: Path, tmp_path: Path) -> None:
    assert "equal: " in printed("diff", saved / "checkpoint_1.pt", saved / "checkpoint_1.pt")
    save_spread(tmp_path / "b", model_state(), row(3), {"model.w": ["S(1)"]}, own)
    done = run("diff", saved / "checkpoint_1.pt", tmp_path / "b" / "checkpoint_1.pt")
    assert done.returncode == 1
    assert "S(0), parts at [(10, 0)]" in done.stdout
    assert "model.b: bfloat16 [11], spread over ranks -> bfloat16 [11]" in done.stdout
    done = run("diff", saved, saved / "checkpoint_1.pt")
    assert_one_line_of_error(done, 2, "compare the directories")


def test_what_cannot_be_compared_with_several_ranks_is_refused(saved: Path, tmp_path: Path) -> None:
    for rank in range(2):
        writer = lastgood.CheckpointWriter(lastgood.CheckpointWriterConfig(), lastgood.RankInfo(rank, 2))
        writer.write(str(tmp_path / "each"), model_state())
    assert_one_line_of_error(run("diff", saved, tmp_path / "each"), 2, "no manifest joins")
    damaged = tmp_path / "damaged"
    save_spread(damaged, model_state(), row(2), USUAL)
    with archive_of(damaged / "checkpoint_1.pt") as archive:
        flip(damaged / "checkpoint_1.pt", archive.layout.storages[0].data_offset + 1)
    assert_one_line_of_error(run("diff", saved, damaged), 2, "checkpoint_1.pt", "'model.w")
    save_spread(tmp_path / "mixed", model_state(2), row(2), USUAL)
    (damaged / "checkpoint_0.pt").replace(tmp_path / "mixed" / "checkpoint_0.pt")
    with pytest.raises(CorruptCheckpointError, match="belongs to another save"):
        WholeSource(str(tmp_path / "mixed"))


# Runs


def test_a_run_of_several_ranks_is_listed_and_found_in_order(tmp_path: Path) -> None:
    root = tmp_path / "run"
    save_spread(root / "step-10", model_state(), row(3), USUAL, own)
    storage = LocalStorage()
    take_epoch(storage, str(root), "a job", 5)
    epoch = read_epoch(storage, str(root))
    assert epoch is not None
    with publishing(storage, str(root), epoch, 5):
        (entry,) = document("ls", root)["steps"]
        files = sum(file.stat().st_size for file in (root / "step-10").glob("*.pt"))
        assert (entry["condition"], entry["world_size"], entry["nbytes"]) == ("committed", 3, files)
        assert document("ls", root)["others"] == []
        assert "Nothing to do." in printed("doctor", root)
    (root / f".{EPOCH_NAME}.lock").touch()  # what a job that was killed leaves behind
    assert "Nothing to do." in printed("doctor", root)
    save_steps(root, [20])
    pruned = document("prune", root, "--keep", "last=1", "--yes")
    assert [entry["step"] for entry in pruned["removed"]] == [10]
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) == [EPOCH_NAME, "step-20"]


def test_a_damaged_epoch_is_explained(tmp_path: Path) -> None:
    save_steps(tmp_path, [10])
    (tmp_path / EPOCH_NAME).write_bytes(b"{}")
    done = run_here("doctor", str(tmp_path))
    assert done.returncode == 1
    assert f"unreadable epoch: {tmp_path / EPOCH_NAME}" in done.stdout
    assert f"rm {tmp_path / EPOCH_NAME}" in done.stdout


def test_the_page_shows_spread_tensors_once_with_their_global_shapes(saved: Path) -> None:
    space = space_of(10, open_contents(str(saved)).files)
    nodes = dict(
        zip(space.nodes.name, zip(space.nodes.shape, space.nodes.nbytes, space.nodes.note, strict=True), strict=True)
    )
    assert nodes["w"] == ("[30, 7]", 840, "S(0) over mesh [3] (dp)")
    assert nodes["b"] == ("[11]", 22, "S(0) over mesh [3] (dp)")
    assert nodes["tied"] == ("[30, 7]", 0, "S(0) over mesh [3] (dp)")
    assert {"rank 0", "rank 1", "rank 2"} <= nodes.keys()
    assert space.nbytes == sum(file.stat().st_size for file in saved.glob("*.pt"))
    assert space.tensors == 9


def test_stages_of_a_pipeline_are_one_state(tmp_path: Path) -> None:
    def stage(number: int, rank: int, seed: int) -> dict[str, Any]:
        layer = {"model": {str(number): {"w": model_state(seed)["model"]["w"] + number}}}
        return spread(layer, Mesh((2,), None, (2 * number, 2 * number + 1)), {f"model.{number}.w": ["S(0)"]}, rank)

    for name, seed in (("a", 1), ("b", 2)):
        commit(tmp_path / name, [stage(rank // 2, rank, seed) for rank in range(4)])
    weight = model_state()["model"]["w"] + 1
    assert torch.equal(torch.tensor(document("cat", tmp_path / "a", "model.1.w")["value"]), weight)
    assert line_of(printed("cat", tmp_path / "a", "model"), "model.1") == "model.1 dict dict of 1"
    found = compare_states(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [(tensor.path, tensor.equal) for tensor in found.tensors] == [("model.0.w", False), ("model.1.w", False)]
