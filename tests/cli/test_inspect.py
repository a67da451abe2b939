"""``lastgood inspect``: what is in a checkpoint, for people and for scripts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.commands import NOTING_TORCH, assert_one_line_of_error, run, run_json, save_steps
from tests.helpers.saves import commit_together
from tests.unit.contents.samples import every_kind, save_in_each_form
from tests.unit.loading.files import flip

import lastgood
from lastgood.cli._tree import MOST_ROWS, ranks_text


def line_of(output: str, key: str) -> str:
    (line,) = (line for line in output.splitlines() if line.split("  ")[0] == key)
    return line


def shown(*words: str | Path) -> str:
    done = run("inspect", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_in_each_form(tmp_path_factory.mktemp("samples"), every_kind())


@pytest.mark.parametrize("kind", ["lastgood", "torch zip", "torch legacy"])
def test_each_key_has_a_line_with_what_is_there(samples: dict[str, Path], kind: str) -> None:
    output = shown(samples[kind])
    assert line_of(output, "model.0.weight").split()[1:] == ["float32", "[3,", "4]", "48", "bytes"]
    assert "parameter, shares memory with model.0.weight" in line_of(output, "parameters.0.weight")
    assert "the same object as tied.a" in line_of(output, "tied.again")
    assert "the same object as list" in line_of(output, "same list")
    assert line_of(output, "plain[1]").endswith("2.5")
    assert line_of(output, "plain[6]").endswith("of length 5")
    assert line_of(output, "more[4]").endswith("torch.Size((2, 3))")
    assert line_of(output, "list").endswith("[1, 2]")
    assert not any(line.startswith("list[0]") for line in output.splitlines())
    assert "21 tensors" in output or "tensors" in output.splitlines()[-2]


def test_totals_count_once_what_is_shared(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    lastgood.save({"a": shared, "b": shared, "c": shared[:10], "d": torch.zeros(5, dtype=torch.int64)}, tmp_path / "x")
    totals = run_json("inspect", tmp_path / "x")["totals"]
    assert totals["nbytes"] == 4000 + 40
    assert totals["nbytes_by_dtype"] == {"float32": 4000, "int64": 40}
    assert (totals["tensors"], totals["elements"]) == (3, 1015)
    assert "3 tensors, 1,015 elements, 3.9 KiB of data" in shown(tmp_path / "x")


def test_scripts_get_every_key_with_all_that_is_known(samples: dict[str, Path]) -> None:
    document = run_json("inspect", samples["lastgood"])
    keys: dict[str, Any] = {entry["path"]: entry for entry in document["keys"]}
    assert keys["model.0.weight"]["shape"] == [3, 4]
    assert keys["model.0.weight"]["nbytes"] == 48
    assert keys["plain[0]"]["value"] == 1
    assert keys["plain[2]"]["value"] is None  # not a number
    assert keys["tied.again"]["same_as"] == "tied.a"
    assert document["files"][0]["kind"] == "lastgood"


def test_torch_is_not_imported(samples: dict[str, Path]) -> None:
    for path in samples.values():
        done = run("inspect", path, program=NOTING_TORCH)
        assert done.stderr == "torch imported: False\n"


# Runs and ranks


def test_of_a_run_the_newest_committed_step_is_taken_and_named(tmp_path: Path) -> None:
    save_steps(tmp_path, [5, 10])
    (tmp_path / "step-20").mkdir()
    output = shown(tmp_path)
    assert "step 10, its newest committed checkpoint" in output
    assert "loss 0.0909091" in output
    assert "step-5/checkpoint_0.pt" in shown(tmp_path, "--step", "5")
    assert_one_line_of_error(run("inspect", tmp_path, "--step", "7"), 2, "no step 7", "5, 10")


def test_a_run_without_a_committed_step_is_sent_to_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "step-20").mkdir()
    assert_one_line_of_error(run("inspect", tmp_path), 2, "lastgood doctor")
    assert_one_line_of_error(run("inspect", tmp_path / "missing"), 2, "no checkpoint at")


def test_ranks_that_agree_share_a_line(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "c", 1, 3) == [None] * 3
    output = shown(tmp_path / "c")
    assert line_of(output, "model.weights").endswith(" 0-2    differs between ranks")
    # Each rank's state has its own number under "step".
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split()[2:4] for line in steps] == [["0", "1,"], ["1", "2,"], ["2", "3,"]]
    assert "rank 2 of 3" in output
    (tmp_path / "c" / "manifest.json").unlink()
    assert "never committed" in shown(tmp_path / "c")


def test_ranks_are_written_as_spans() -> None:
    assert ranks_text([0]) == "0"
    assert ranks_text([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"


# Many keys


def test_many_keys_are_shown_as_groups_unless_asked_for(tmp_path: Path) -> None:
    state = {f"layers.{number // 4}.part{number % 4}": torch.zeros(2) for number in range(1000)}
    lastgood.save({"model": state, "step": 1}, tmp_path / "many.pt")
    output = shown(tmp_path / "many.pt")
    assert len(output.splitlines()) <= MOST_ROWS + 10
    assert line_of(output, "model.layers.7*").split()[1:] == ["4", "tensors", "32", "bytes"]
    assert "1,000 keys are hidden" in output
    assert line_of(shown(tmp_path / "many.pt", "--depth", "2"), "model.layers*").split()[1] == "1,000"
    everything = shown(tmp_path / "many.pt", "--all")
    assert sum(line.startswith("model.layers.") for line in everything.splitlines()) == 1000
    assert "hidden" not in everything
    assert len(run_json("inspect", tmp_path / "many.pt")["keys"]) == 1002


def test_keys_without_parts_are_all_shown_with_depth_one(tmp_path: Path) -> None:
    lastgood.save({f"w{number}": number for number in range(10)}, tmp_path / "x")
    assert len(run("inspect", tmp_path / "x", "--depth", "1").stdout.splitlines()) == 13


# Statistics


def test_statistics_are_those_that_torch_computes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    large = torch.randn(3, 700_000, generator=generator) * 5 + 100
    holed = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf, math.nan])
    state = {"large": large.t(), "holed": holed, "ints": torch.arange(10), "none": torch.empty(0), "flag": [True]}
    lastgood.save(state, tmp_path / "x")
    keys = {entry["path"]: entry for entry in run_json("inspect", tmp_path / "x", "--stats")["keys"]}
    assert keys["large"]["stats"]["mean"] == pytest.approx(float(large.double().mean()), rel=1e-12)
    assert keys["large"]["stats"]["std"] == pytest.approx(float(large.double().std(correction=0)), rel=1e-9)
    assert keys["large"]["stats"]["max"] == float(large.max())
    assert keys["holed"]["stats"] == {"min": 1, "max": 3, "mean": 2, "std": 1, "nan": 2, "inf": 2}
    assert keys["ints"]["stats"]["std"] == pytest.approx(float(torch.arange(10.0).std(correction=0)))
    assert keys["none"]["stats"]["mean"] is None
    assert "stats" not in keys["flag"]
    assert line_of(shown(tmp_path / "x", "--stats"), "holed").split()[-6:] == ["1", "3", "2", "1", "2", "2"]


def test_statistics_of_damaged_data_are_an_error(tmp_path: Path) -> None:
    lastgood.save({"w": torch.ones(10_000)}, tmp_path / "x")
    flip(tmp_path / "x", 10_000)
    assert run("inspect", tmp_path / "x").returncode == 0
    assert_one_line_of_error(run("inspect", tmp_path / "x", "--stats"), 1, "'w'", "checksum")
