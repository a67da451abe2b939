"""``lastgood cat``: one value, verified, and nothing else read."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.cli.commands import NOTING_TORCH, assert_one_line_of_error, run, run_json, save_steps
from tests.helpers.saves import commit_together, state_of
from tests.unit.contents.samples import CountingStorage, every_kind, save_in_each_form
from tests.unit.loading.files import archive_of, flip

import lastgood
from lastgood.cli._keys import find_key, near_keys
from lastgood.cli._tensors import TensorSource
from lastgood.errors import CorruptCheckpointError
from lastgood.format.nodes import TensorNode

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_in_each_form(tmp_path_factory.mktemp("samples"), every_kind())


def printed(*words: str | Path) -> str:
    done = run("cat", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Printing


@pytest.mark.parametrize("kind", ["lastgood", "torch zip", "torch legacy"])
def test_a_tensor_is_printed_as_torch_prints_it(samples: dict[str, Path], kind: str) -> None:
    assert printed(samples[kind], "tied.transposed") == (
        f"tied.transposed: float32 [4, 3]\n{torch.arange(12.0).reshape(3, 4).t()!r}\n"
    )
    assert repr(torch.ones(3, dtype=torch.complex64)) in printed(samples[kind], "conj").replace("-0.j", "+0.j")
    assert "size=(3, 3), nnz=3" in printed(samples[kind], "sparse")


def test_a_large_tensor_is_summed_up_unless_all_is_wanted(tmp_path: Path) -> None:
    lastgood.save({"w": torch.arange(5000)}, tmp_path / "x")
    assert "..." in printed(tmp_path / "x", "w")
    everything = printed(tmp_path / "x", "w", "--all")
    assert "..." not in everything
    assert all(f" {number}" in everything for number in (1234, 4321, 4999))
    document = run_json("cat", tmp_path / "x", "w")
    assert (document["complete"], document["value"], document["shape"]) == (False, None, [5000])
    assert run_json("cat", tmp_path / "x", "w", "--all")["value"] == list(range(5000))


def test_plain_values_are_printed_without_torch(samples: dict[str, Path]) -> None:
    for kind in ("lastgood", "torch zip"):
        done = run("cat", samples[kind], "plain[4]", program=NOTING_TORCH)
        assert (done.stdout, done.stderr) == ("text\n", "torch imported: False\n")
    assert printed(samples["lastgood"], "more[1]") == f"{-(2**70)}\n"
    assert run_json("cat", samples["lastgood"], "plain[1]")["value"] == 2.5


def test_containers_show_what_is_in_them(samples: dict[str, Path]) -> None:
    output = printed(samples["lastgood"], "tied")
    assert [line.split()[0] for line in output.splitlines()[2:]] == [
        "tied.a", "tied.again", "tied.transposed", "tied.part"
    ]  # fmt: skip
    assert printed(samples["lastgood"], "same list").endswith("[1, 2]\n")


def test_scripts_get_the_elements_of_tensors_of_any_dtype(tmp_path: Path) -> None:
    state = {
        "conj": torch.tensor([1 + 2j]).conj(),
        "half": torch.tensor([[0.5], [float("nan")]], dtype=torch.bfloat16),
        "sparse": torch.eye(2).to_sparse(),
    }
    lastgood.save(state, tmp_path / "x")
    values = {key: run_json("cat", tmp_path / "x", key)["value"] for key in ("conj", "half")}
    assert values == {"conj": [[1, -2]], "half": [[0.5], [None]]}
    assert run_json("cat", tmp_path / "x", "sparse")["value"] == [[1, 0], [0, 1]]


# Keys


def test_a_key_that_is_not_there_is_answered_with_those_that_look_like_it(samples: dict[str, Path]) -> None:
    assert_one_line_of_error(run("cat", samples["lastgood"], "modle.0.weight"), 2, "modle.0.weight", "model.0.weight")


def test_near_keys_are_found_among_very_many() -> None:
    keys = [f"layers.{number}.weight" for number in range(20_000)]
    assert "layers.19999.weight" in near_keys(keys, "layers.19999.wieght")


def test_a_key_that_two_values_have_is_refused(tmp_path: Path) -> None:
    lastgood.save({"a.b": 1, "a": {"b": 2}}, tmp_path / "x")
    assert_one_line_of_error(run("cat", tmp_path / "x", "a.b"), 2, "2 values", "a.b")


def test_of_several_ranks_the_first_or_the_named_one_is_taken(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "c", 7) == [None, None]
    assert printed(tmp_path / "c", "step") == "7\n"
    assert printed(tmp_path / "c", "step", "--rank", "1") == "8\n"
    assert_one_line_of_error(run("cat", tmp_path / "c", "step", "--rank", "2"), 2, "no file of rank 2")


def test_of_a_run_the_newest_step_is_taken(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    assert printed(tmp_path, "step").splitlines()[-1] == "2"
    assert printed(tmp_path, "step", "--step", "1") == "1\n"


# Saving


@pytest.mark.parametrize("kind", ["lastgood", "torch zip", "torch legacy"])
def test_what_is_saved_is_what_was_there(samples: dict[str, Path], tmp_path: Path, kind: str) -> None:
    state = lastgood.load(samples[kind])
    weight: Any = state["parameters"]["0.weight"]
    printed(samples[kind], "parameters.0.weight", "-o", tmp_path / "w.pt")
    loaded = lastgood.load(tmp_path / "w.pt")
    assert isinstance(loaded, torch.nn.Parameter)
    assert torch.equal(loaded, weight)
    printed(samples[kind], "tied.transposed", "-o", tmp_path / "t.npy")
    assert numpy.array_equal(numpy.load(tmp_path / "t.npy"), state["tied"]["transposed"].numpy())
    printed(samples[kind], "tied", "-o", tmp_path / "tied.pt")
    tied = lastgood.load(tmp_path / "tied.pt")
    assert tied["a"] is tied["again"]
    assert torch.equal(tied["part"], state["tied"]["part"])


def test_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    lastgood.save({"half": torch.ones(2, dtype=torch.bfloat16), "text": "x"}, tmp_path / "x")
    assert_one_line_of_error(run("cat", tmp_path / "x", "half", "-o", tmp_path / "h.npy"), 2, "bfloat16", ".pt")
    assert_one_line_of_error(run("cat", tmp_path / "x", "text", "-o", tmp_path / "t.npy"), 2, "only a tensor")
    assert_one_line_of_error(run("cat", tmp_path / "x", "half", "-o", tmp_path / "h.csv"), 2, ".npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_scripts_learn_where_a_value_was_saved(tmp_path: Path) -> None:
    lastgood.save({"w": torch.ones(2)}, tmp_path / "x")
    done = run("cat", tmp_path / "x", "w", "-o", tmp_path / "w.pt", "--json")
    assert json.loads(done.stdout)["output"] == str(tmp_path / "w.pt")


# Reading


@pytest.mark.parametrize("kind", ["lastgood", "torch zip"])
def test_only_the_blocks_of_the_tensor_are_read(tmp_path: Path, kind: str) -> None:
    state = {f"w{number}": torch.full((3 * MEBIBYTE,), float(number)) for number in range(6)}
    path = tmp_path / "large.pt"
    lastgood.save(state, path) if kind == "lastgood" else torch.save(state, path)
    storage = CountingStorage()
    with TensorSource(str(path), storage.open(str(path))) as source:
        _, node = find_key((source.contents,), "w4")
        assert torch.equal(source.value(node), state["w4"])
    assert 12 * MEBIBYTE <= storage.bytes_read < 12 * MEBIBYTE + 256 * 1024


def test_of_a_part_of_a_storage_only_its_blocks_are_read(tmp_path: Path) -> None:
    whole = torch.arange(16 * MEBIBYTE)
    lastgood.save({"whole": whole, "part": whole[5_000_000:5_000_010]}, tmp_path / "x")
    storage = CountingStorage()
    with TensorSource(str(tmp_path / "x"), storage.open(str(tmp_path / "x"))) as source:
        _, node = find_key((source.contents,), "part")
        assert source.value(node).tolist() == list(range(5_000_000, 5_000_010))
    assert storage.bytes_read < 2 * MEBIBYTE + 128 * 1024


@pytest.mark.parametrize("kind", ["lastgood", "torch zip"])
def test_damage_is_found_in_what_is_read(tmp_path: Path, kind: str) -> None:
    state = {"a": torch.arange(50_000), "b": torch.ones(50_000)}
    path = tmp_path / "x"
    lastgood.save(state, path) if kind == "lastgood" else torch.save(state, path)
    data = path.read_bytes()
    flip(path, data.index(torch.arange(50_000).numpy().tobytes()) + 80_000)
    assert run("cat", path, "b").returncode == 0
    assert_one_line_of_error(run("cat", path, "a"), 1, "is damaged")


def test_parts_of_one_record_of_torchs_are_checked_with_the_whole(tmp_path: Path) -> None:
    whole = torch.arange(50_000)
    torch.save({"part": whole[:5], "whole": whole}, tmp_path / "x")
    with TensorSource(str(tmp_path / "x")) as source:
        _, node = find_key((source.contents,), "part")
        assert isinstance(node, TensorNode)
        assert source.read([node])[0].tolist() == [0, 1, 2, 3, 4]
    flip(tmp_path / "x", (tmp_path / "x").read_bytes().index(whole.numpy().tobytes()) + 390_000)
    with (
        TensorSource(str(tmp_path / "x")) as source,
        pytest.raises(CorruptCheckpointError, match="CRC-32"),
    ):
        source.read([node])


def test_a_file_that_was_cut_while_it_was_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lastgood.save(state_of(1), path)
    with archive_of(path) as archive:
        end = archive.layout.storages[0].data_offset
    with TensorSource(str(path)) as source:
        with path.open("r+b") as file:
            file.truncate(end)
        with pytest.raises(CorruptCheckpointError):
            source.value(source.contents.root)
