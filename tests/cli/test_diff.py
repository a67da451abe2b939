"""``lastgood diff``: what changed, by how much, and what moved most."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.cli.commands import assert_one_line_of_error, run, run_json, save_steps
from tests.helpers.saves import commit_together
from tests.unit.contents.samples import every_kind, save_in_each_form
from tests.unit.loading.files import flip

import lastgood
from lastgood.cli import _compare
from lastgood.cli._compare import Comparison, TensorChange, compare_states


@pytest.fixture
def compare(tmp_path: Path) -> Any:
    def compared(a: Any, b: Any) -> Comparison:
        lastgood.save(a, tmp_path / "a.pt")
        lastgood.save(b, tmp_path / "b.pt")
        return compare_states(str(tmp_path / "a.pt"), str(tmp_path / "b.pt"))

    return compared


def change_of(found: Comparison, path: str = "w") -> TensorChange:
    (change,) = (tensor for tensor in found.tensors if tensor.path == path)
    return change


# The comparison


def test_the_same_state_is_equal_in_whatever_format(tmp_path: Path) -> None:
    paths = list(save_in_each_form(tmp_path, every_kind()).values())
    for a in paths:
        found = compare_states(str(a), str(paths[0]))
        assert found.is_equal
        assert not found.not_compared
        assert len(found.tensors) > 15


def test_changes_are_measured_as_defined(compare: Any) -> None:
    a, b = torch.tensor([3.0, 0.0, -4.0]), torch.tensor([3.0, 0.5, -3.0])
    change = change_of(compare({"w": a}, {"w": b}))
    assert (change.changed, change.max_abs, change.max_rel) == (2, 1.0, 0.25)
    assert change.norm_a == 5.0
    assert change.norm_change == pytest.approx(math.sqrt(1.25))
    assert change.rms_change == pytest.approx(math.sqrt(1.25) / 5)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "largest"),
    [
        (torch.int64, [2**62], [2**62 + 1], 1.0),
        (torch.uint8, [0, 255], [255, 255], 255.0),
        (torch.bool, [True, False], [True, True], 1.0),
        (torch.uint16, [1], [4], 3.0),
        (torch.bfloat16, [1.0, 2.0], [1.0, 2.5], 0.5),
        (torch.float8_e5m2, [1.0, 2.0], [1.0, 4.0], 2.0),
        (torch.complex64, [1 + 1j], [4 + 5j], 5.0),
        (torch.complex128, [1 + 1j, 0j], [1 + 1j, 2j], 2.0),
    ],
    ids=str,
)
def test_every_dtype_is_compared(compare: Any, dtype: torch.dtype, a: list[Any], b: list[Any], largest: float) -> None:
    first, second = torch.tensor(a).to(dtype), torch.tensor(b).to(dtype)
    assert change_of(compare({"w": first}, {"w": second})).max_abs == largest
    assert compare({"w": first}, {"w": first.clone()}).is_equal


def test_nan_in_the_same_place_is_no_difference_and_elsewhere_is_one(compare: Any) -> None:
    nan = float("nan")
    same = compare({"w": torch.tensor([nan, 1.0])}, {"w": torch.tensor([nan, 1.0])})
    assert same.is_equal
    assert change_of(same).nan_in_both == 1
    found = change_of(compare({"w": torch.tensor([nan, 1.0, 2.0])}, {"w": torch.tensor([nan, nan, 3.0])}))
    assert (found.equal, found.nan_in_both, found.nan_in_one, found.changed) == (False, 1, 1, 2)
    assert math.isinf(found.max_abs)
    assert found.norm_change == 1.0


def test_zeros_of_either_sign_are_equal(compare: Any) -> None:
    assert compare({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])}).is_equal


def test_what_began_at_zero_moved_infinitely(compare: Any) -> None:
    change = change_of(compare({"w": torch.zeros(3)}, {"w": torch.ones(3)}))
    assert (change.rms_change, change.max_rel, change.max_abs) == (math.inf, None, 1.0)


def test_large_tensors_are_compared_in_pieces(compare: Any, monkeypatch: pytest.MonkeyPatch, rng_seed: int) -> None:
    generator = torch.Generator().manual_seed(rng_seed)
    a = torch.randn(13, 7, 11, generator=generator)
    b = a + torch.randn(13, 7, 11, generator=generator)
    whole = change_of(compare({"w": a}, {"w": b.transpose(0, 2).contiguous().transpose(0, 2)}))
    monkeypatch.setattr(_compare, "_PIECE_ELEMENTS", 50)
    pieces = change_of(compare({"w": a}, {"w": b.transpose(0, 2).contiguous().transpose(0, 2)}))
    assert whole.norm_change == pytest.approx(float((b.double() - a.double()).norm()))
    assert pieces.norm_change == pytest.approx(whole.norm_change)
    assert (pieces.changed, pieces.max_abs, pieces.max_rel) == (whole.changed, whole.max_abs, whole.max_rel)


@given(
    changed=st.lists(st.integers(0, 29), max_size=5, unique=True),
    sizes=st.lists(st.integers(0, 40), min_size=30, max_size=30),
)
def test_just_the_tensors_that_changed_are_said_to_have(
    tmp_path_factory: pytest.TempPathFactory, changed: list[int], sizes: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("states")
    kinds = (torch.float32, torch.int16, torch.float64)
    a = {f"w{number}": torch.ones(size, dtype=kinds[number % 3]) for number, size in enumerate(sizes)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    expected = {f"w{number}" for number in changed if sizes[number]}
    for name in expected:
        b[name][-1] = 7
    lastgood.save(a, directory / "a")
    lastgood.save(b, directory / "b")
    found = compare_states(str(directory / "a"), str(directory / "b"))
    assert {tensor.path for tensor in found.tensors if not tensor.equal} == expected
    assert all(tensor.max_abs == 6 and tensor.changed == 1 for tensor in found.tensors if not tensor.equal)


def test_keys_kinds_and_plain_values_are_compared(compare: Any) -> None:
    a = {"same": 1, "lr": 0.1, "gone": {"x": 1, "y": 2}, "kind": 1, "shape": torch.ones(2), "dtype": torch.ones(2)}
    b = {"same": 1, "lr": 0.2, "new": [1], "kind": "1", "shape": torch.ones(3), "dtype": torch.ones(2).half()}
    found = compare(a, b)
    assert (found.only_in_a, found.only_in_b) == (("gone",), ("new",))
    assert {(one.path, one.a, one.b) for one in found.changed_kind} == {
        ("kind", "int", "str"),
        ("shape", "float32 [2]", "float32 [3]"),
        ("dtype", "float32 [2]", "float16 [2]"),
    }
    assert [(one.path, one.a, one.b) for one in found.changed_values] == [("lr", "0.1", "0.2")]
    assert found.tensors == ()


def test_nan_as_a_plain_value_equals_itself(compare: Any) -> None:
    assert compare({"loss": float("nan")}, {"loss": float("nan")}).is_equal


def test_what_only_a_pickle_describes_is_compared_too(compare: Any) -> None:
    one, two = torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()
    assert compare({"w": one}, {"w": torch.eye(3).to_sparse()}).is_equal
    assert [change.path for change in compare({"w": one}, {"w": two}).changed_values] == ["w"]


def test_other_ties_between_objects_are_a_difference(compare: Any) -> None:
    one, two = [1, 2], [1, 2]
    found = compare({"a": one, "b": two, "c": one}, {"a": one, "b": two, "c": two})
    assert [(change.path, change.a, change.b) for change in found.changed_values] == [
        ("c", "the same object as a", "the same object as b")
    ]


def test_tied_tensors_equal_copies_of_them(compare: Any) -> None:
    shared = torch.randn(5)
    assert compare({"a": shared, "b": shared}, {"a": shared, "b": shared.clone()}).is_equal


def test_layers_are_ranked_by_how_far_they_moved_together(compare: Any) -> None:
    a = {name: torch.ones(4) for name in ("m.0.w", "m.0.b", "m.1.w", "m.2.w")} | {"m.2.n": torch.tensor(5)}
    b = {**a, "m.1.w": a["m.1.w"] * 1.5, "m.0.w": a["m.0.w"] * 1.1, "m.2.n": torch.tensor(500)}
    found = compare({"s": a}, {"s": b})
    assert [layer.path for layer in found.layers] == ["s.m.1", "s.m.0", "s.m.2"]
    assert found.layers[0].rms_change == pytest.approx(0.5)
    assert found.layers[1].rms_change == pytest.approx(0.1 / math.sqrt(2))
    assert found.layers[2].rms_change == 0  # a counter is no weight


def test_ranks_are_compared_with_each_other(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "a", 1) == [None, None]
    assert commit_together(tmp_path / "b", 1) == [None, None]
    assert compare_states(str(tmp_path / "a"), str(tmp_path / "b")).is_equal
    assert commit_together(tmp_path / "c", 1, 3) == [None] * 3
    found = compare_states(str(tmp_path / "a"), str(tmp_path / "c"))
    assert found.only_in_b == ("rank 2",)
    assert {tensor.path for tensor in found.tensors} >= {"rank 0: model.weights", "rank 1: model.weights"}


# The command


def test_the_exit_status_is_that_of_diff(tmp_path: Path) -> None:
    lastgood.save({"w": torch.ones(3)}, tmp_path / "a")
    torch.save({"w": torch.ones(3)}, tmp_path / "b")
    lastgood.save({"w": torch.zeros(3)}, tmp_path / "c")
    equal = run("diff", tmp_path / "a", tmp_path / "b")
    assert (equal.returncode, equal.stdout) == (0, "equal: 1 tensors and 0 plain values\n")
    assert run("diff", tmp_path / "a", tmp_path / "c").returncode == 1
    assert_one_line_of_error(run("diff", tmp_path / "a", tmp_path / "missing"), 2, "missing")
    (tmp_path / "d").write_bytes((tmp_path / "c").read_bytes()[:-1])
    assert_one_line_of_error(run("diff", tmp_path / "a", tmp_path / "d"), 2, "is damaged")


def test_damage_is_trouble_and_no_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lastgood.save({"w": torch.arange(100_000)}, tmp_path / name)
    flip(tmp_path / "b", 50_000)
    assert_one_line_of_error(run("diff", tmp_path / "a", tmp_path / "b"), 2, "'w'", "checksum")
    traced = run("--debug", "diff", tmp_path / "a", tmp_path / "b")
    assert "Traceback" in traced.stderr


def test_people_see_what_moved_most(tmp_path: Path) -> None:
    a = {f"layer{number}.w": torch.ones(10) for number in range(30)}
    b = {name: tensor * (1 + 0.01 * number) for number, (name, tensor) in enumerate(a.items())}
    lastgood.save({"model": a, "lr": 1.0, "old": 1}, tmp_path / "a")
    lastgood.save({"model": b, "lr": 0.5, "new": 1}, tmp_path / "b")
    output = run("diff", tmp_path / "a", tmp_path / "b", "--top", "3").stdout
    lines = output.splitlines()
    start = lines.index("layers that moved most (3 of 29):")
    assert [line.split()[-1] for line in lines[start + 2 : start + 5]] == [f"model.layer{n}" for n in (29, 28, 27)]
    assert lines[start + 2].split()[0] == "0.29"
    assert "  lr: 1.0 -> 0.5" in lines
    assert lines[lines.index(f"only in {tmp_path / 'a'}:") + 1] == "  old"
    assert lines[-1] == "different: 29 of 30 tensors that both have changed, 1 are equal"


def test_scripts_get_every_tensor_and_layer(tmp_path: Path) -> None:
    lastgood.save({"w": torch.tensor([0.0, 1.0]), "v": torch.ones(2)}, tmp_path / "a")
    lastgood.save({"w": torch.tensor([0.0, math.inf]), "v": torch.ones(2)}, tmp_path / "b")
    document = run_json("diff", tmp_path / "a", tmp_path / "b", status=1)
    tensors = {tensor["path"]: tensor for tensor in document["tensors"]}
    assert document["equal"] is False
    assert tensors["v"]["equal"] is True
    assert tensors["w"]["max_abs"] is None  # infinite
    assert len(document["layers"]) == 1


def test_runs_are_compared_by_their_newest_steps(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", [1, 2])
    save_steps(tmp_path / "b", [2])
    done = run("diff", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0
    assert done.stdout.count("newest committed") == 2


def test_what_torch_refuses_to_load_is_not_called_equal(tmp_path: Path) -> None:
    program = """
import sys, warnings, datetime, lastgood
warnings.simplefilter("ignore")
lastgood.save({"when": datetime.timedelta(5), "x": 1}, sys.argv[1])
"""
    for name in ("a", "b"):
        assert run(tmp_path / name, program=program).returncode == 0
    done = run("diff", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2
    assert "when (datetime.timedelta)" in done.stdout
    assert run_json("diff", tmp_path / "a", tmp_path / "b", status=2)["equal"] is False
