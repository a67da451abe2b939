"""``lastgood export``: one plain file of whole tensors, whoever saved and in whatever layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.commands import NOTING_TORCH, assert_one_line_of_error, run, save_steps, tree
from tests.helpers.saves import commit_together, state_of
from tests.helpers.sharded import USUAL, commit, model_state, row, save_spread, spread
from tests.storage.recording import RecordingFileOps
from tests.unit.loading.files import archive_of, flip

import lastgood
from lastgood.cli import export as verb
from lastgood.format.identity import read_identity
from lastgood.format.mesh import Mesh
from lastgood.storage.local import LocalStorage


def own(rank: int) -> dict[str, Any]:
    return {"rng": torch.tensor([rank]), "loader": {"position": 10 * rank, "epoch": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "c"
    save_spread(path, model_state(), row(3, "dp"), USUAL, own)
    return path


def exported(path: Path, out: Path, *rules: str, **options: Any) -> Any:
    """What torch loads of the file that was written."""
    words = [word for rule in rules for word in ("--per-rank", rule)]
    done = run("export", path, out, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{out}: " in done.stdout
    return torch.load(out, weights_only=True)


def assert_model(found: Any, seed: int = 1) -> None:
    expected = model_state(seed)
    assert found["epoch"] == 3
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor)


# Several ranks


def test_torch_loads_whole_tensors(saved: Path, tmp_path: Path) -> None:
    found = exported(saved, tmp_path / "out.pt", "rng=first", "loader=2")
    assert_model(found)
    assert found["rng"].tolist() == [0]
    assert found["loader"] == {"position": 20, "epoch": 1}
    assert found.keys() == {"model", "epoch", "rng", "loader"}
    assert run("verify", tmp_path / "out.pt").returncode == 0


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        (Mesh((2, 2), None, (2, 0, 3, 1)), {"model.w": ["_S(0, 2)", "S(0)"], "model.scale": ["R", "S(0)"]}),
        (row(4), {"model.w": ["S(1)"], "model.b": ["R"]}),
    ],
    ids=["grid", "columns"],
)
def test_any_layout_gives_the_same_file(tmp_path: Path, mesh: Mesh, placements: Any) -> None:
    save_spread(tmp_path / "c", model_state(), mesh, placements)
    assert_model(exported(tmp_path / "c", tmp_path / "out.pt"))


def test_values_that_ranks_have_of_their_own_need_a_rule(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run("export", saved, out, "--per-rank", "rng=first")
    assert_one_line_of_error(done, 1, "3 ranks", "loader.position", "--per-rank loader=first", "Nothing was written")
    assert list(tmp_path.iterdir()) == []
    found = exported(saved, out, "rng=all", "loader.pos*=leave")
    assert [each.tolist() for each in found["rng"]] == [[0], [1], [2]]
    assert found["loader"] == {"epoch": 1}


def test_scripts_learn_what_was_left_out(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run("export", saved, out, "--per-rank", "[rl]*=leave", "--json")
    assert json.loads(done.stdout) == {
        "path": str(saved),
        "output": str(out),
        "nbytes": out.stat().st_size,
        "world_size": 3,
        "left_out": ["rng", "loader.position", "loader.epoch"],
    }
    assert "left out: rng" in run("export", saved, out, "--overwrite", "--per-rank", "[rl]*=leave").stdout


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("rng", "KEY=RULE"),
        ("=first", "KEY=RULE"),
        ("rgn=first", "no key of"),
        ("rng=3", "the ranks 0 to 2"),
        ("rng=last", "'last' is neither"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(saved: Path, tmp_path: Path, rule: str, said: str) -> None:
    assert_one_line_of_error(run("export", saved, tmp_path / "out.pt", "--per-rank", rule), 2, said)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_did_not_vote_are_not_taken_for_alike(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "c", 7) == [None, None]
    done = run("export", tmp_path / "c", tmp_path / "out.pt")
    assert_one_line_of_error(done, 1, "model.bias, model.weights, step")
    found = exported(tmp_path / "c", tmp_path / "out.pt", "model=1", "step=all")
    assert torch.equal(found["model"]["weights"], state_of(8)["model"]["weights"])
    assert found["step"] == [7, 8]


def test_stages_of_a_pipeline_come_together(tmp_path: Path) -> None:
    def stage(number: int, rank: int) -> dict[str, Any]:
        mesh = Mesh((2,), None, (2 * number, 2 * number + 1))
        layer = {"model": {str(number): {"w": torch.arange(6.0) + number, "step": 5 + number}}}
        return spread(layer, mesh, {f"model.{number}.w": ["S(0)"]}, rank)

    commit(tmp_path / "c", [stage(rank // 2, rank) for rank in range(4)])
    found = exported(tmp_path / "c", tmp_path / "out.pt")
    assert [found["model"][str(number)]["w"].tolist() for number in range(2)] == [
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6],
    ]
    assert [found["model"][str(number)]["step"] for number in range(2)] == [5, 6]


def test_damage_is_found_and_nothing_written(tmp_path: Path) -> None:
    save_spread(tmp_path / "c", model_state(), row(2), USUAL)
    with archive_of(tmp_path / "c" / "checkpoint_1.pt") as archive:
        flip(tmp_path / "c" / "checkpoint_1.pt", archive.layout.storages[0].data_offset + 1)
    done = run("export", tmp_path / "c", tmp_path / "out.pt")
    assert_one_line_of_error(done, 1, "checkpoint_1.pt", "model.w")
    assert not (tmp_path / "out.pt").exists()


# One rank, and files


def test_one_ranks_checkpoint_and_its_notes_are_taken_over(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", [5, 10])
    found = exported(tmp_path / "run", tmp_path / "out.pt")
    assert found == {"weights": [10.0] * 10, "step": 10}
    identity = read_identity(LocalStorage().open(str(tmp_path / "out.pt")))
    assert identity is not None
    assert (identity.step, identity.saved_at, identity.metrics) == (10, 1.7e9 + 3600, {"loss": 1 / 11})
    assert "newest" in run("export", tmp_path / "run", tmp_path / "other.pt").stdout
    run("export", tmp_path / "run", tmp_path / "five.pt", "--step", "5")
    assert torch.load(tmp_path / "five.pt")["step"] == 5


def test_files_of_torch_are_taken_too(tmp_path: Path) -> None:
    torch.save(model_state(), tmp_path / "torch.pt")
    assert_model(exported(tmp_path / "torch.pt", tmp_path / "out.pt"))
    (tmp_path / "c").mkdir()
    torch.save(model_state(2), tmp_path / "c" / "checkpoint_0.pt")
    assert_model(exported(tmp_path / "c", tmp_path / "two.pt"), 2)


def test_what_is_no_state_by_itself_is_refused(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    assert_one_line_of_error(run("export", saved / "checkpoint_1.pt", out), 2, "rank 1 of 3", "directory")
    save_spread(tmp_path / "c", model_state(), row(2), USUAL)
    (tmp_path / "c" / "manifest.json").unlink()
    assert_one_line_of_error(run("export", tmp_path / "c", out), 1, "never committed")
    for rank in range(2):
        writer = lastgood.CheckpointWriter(lastgood.CheckpointWriterConfig(), lastgood.RankInfo(rank, 2))
        writer.write(str(tmp_path / "each"), model_state())
    assert_one_line_of_error(run("export", tmp_path / "each", out), 2, "each for itself", "checkpoint_0.pt")
    assert_model(exported(tmp_path / "each" / "checkpoint_1.pt", out))
    (tmp_path / "torch").mkdir()
    for rank in range(2):
        torch.save({}, tmp_path / "torch" / f"checkpoint_{rank}.pt")
    done = run("export", tmp_path / "torch", tmp_path / "other.pt")
    assert_one_line_of_error(done, 2, "belong to no save")


# The file that is written


def test_a_file_that_is_there_is_only_replaced_if_asked_for(tmp_path: Path) -> None:
    lastgood.save(model_state(), tmp_path / "in.pt")
    out = tmp_path / "out.pt"
    out.write_text("precious")
    assert_one_line_of_error(run("export", tmp_path / "in.pt", out), 2, "is there already", "--overwrite")
    assert out.read_text() == "precious"
    assert run("export", tmp_path / "in.pt", out, "--overwrite").returncode == 0
    assert_model(torch.load(out))
    assert_one_line_of_error(run("export", tmp_path / "in.pt", tmp_path), 2, "is a directory")


def test_one_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lastgood.save(model_state(), tmp_path / "in.pt")
    out = tmp_path / "out.pt"
    load = verb._load

    def appear(*arguments: Any) -> Any:
        out.write_text("precious")
        return load(*arguments)

    monkeypatch.setattr(verb, "_load", appear)
    assert_one_line_of_error(run("export", tmp_path / "in.pt", out), 2, "is there already")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.pt"]
    assert out.read_text() == "precious"


def test_a_checkpoint_is_never_written_over_by_itself(saved: Path) -> None:
    before = tree(saved)
    done = run("export", saved, saved / "checkpoint_1.pt", "--overwrite", "--per-rank", "*=first")
    assert_one_line_of_error(done, 2, "belongs to the checkpoint itself")
    assert tree(saved) == before


def test_it_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lastgood.save(model_state(), tmp_path / "in.pt")
    ops = RecordingFileOps()
    monkeypatch.setattr("lastgood.storage.local.LocalStorage.__init__.__defaults__", (ops,))
    assert run("export", tmp_path / "in.pt", tmp_path / "out.pt").returncode == 0
    names = [call.name for call in ops.calls]
    (published,) = (place for place, name in enumerate(names) if name in ("link", "replace"))
    assert "fsync" in names[:published]
    assert "fsync_directory" in names[published:]


def test_help_comes_without_torch_and_says_what_it_needs() -> None:
    done = run("export", "--help", program=NOTING_TORCH)
    assert done.stderr == "torch imported: False\n"
    assert "has to fit into memory" in " ".join(done.stdout.split())
