"""What moved between two steps, from two real checkpoints."""

import math
from pathlib import Path

import pytest
import torch

import lastgood
from lastgood.cli._compare import compare_states
from lastgood.cli._report.data import Movement
from lastgood.cli._report.movement import MOST_KEYS, MOST_TENSORS, movement_of


@pytest.fixture
def compared(tmp_path: Path) -> Movement:
    a = {"model": {"l.0.w": torch.ones(4), "l.1.w": torch.ones(4), "l.1.b": torch.zeros(2)}, "gone": 1, "epoch": 3}
    b = {"model": {"l.0.w": torch.ones(4), "l.1.w": torch.full((4,), 1.5), "l.1.b": torch.zeros(3)}, "epoch": 4}
    lastgood.save(a, tmp_path / "a.pt")
    lastgood.save(b, tmp_path / "b.pt")
    return movement_of(1, 2, compare_states(str(tmp_path / "a.pt"), str(tmp_path / "b.pt")))


def test_what_moved_most_comes_first_and_what_did_not_is_equal(compared: Movement) -> None:
    assert (compared.count, compared.equal) == (2, 1)
    first, second = compared.tensors
    assert (first.path, first.relative, first.max_abs, first.norm) == ("model.l.1.w", 0.5, 0.5, 2.0)
    assert (second.path, second.equal, second.relative) == ("model.l.0.w", True, 0.0)
    assert [(layer.path, layer.relative) for layer in compared.layers] == [("model.l.1", 0.5), ("model.l.0", 0.0)]


def test_what_cannot_be_measured_is_named(compared: Movement) -> None:
    assert compared.only_in_a == ["gone"]
    assert compared.only_in_b == []
    (changed,) = compared.changed_kind
    assert changed.startswith("model.l.1.b: ")
    assert compared.changed_values == ["epoch: 3, then 4"]


def test_what_became_nan_comes_before_all_that_only_moved(tmp_path: Path) -> None:
    lastgood.save({"x": torch.ones(3), "y": torch.ones(3), "z": torch.zeros(3)}, tmp_path / "a.pt")
    b = {"x": torch.full((3,), 9.0), "y": torch.tensor([1.0, math.nan, 1.0]), "z": torch.ones(3)}
    lastgood.save(b, tmp_path / "b.pt")
    movement = movement_of(1, 2, compare_states(str(tmp_path / "a.pt"), str(tmp_path / "b.pt")))
    assert [tensor.path for tensor in movement.tensors] == ["y", "z", "x"]
    assert movement.tensors[0].nan_in_one == 1
    assert movement.tensors[1].relative is None  # from nothing to something: no finite share


def test_a_page_gets_no_more_than_it_can_show(tmp_path: Path) -> None:
    many = MOST_TENSORS + 100
    lastgood.save({f"k{number}": torch.zeros(1) for number in range(many)} | {"b": 1}, tmp_path / "a.pt")
    b = {f"k{number}": torch.ones(1) for number in range(many)} | {
        f"only{number}": 1 for number in range(MOST_KEYS + 5)
    }
    lastgood.save(b, tmp_path / "b.pt")
    movement = movement_of(1, 2, compare_states(str(tmp_path / "a.pt"), str(tmp_path / "b.pt")))
    assert (movement.count, len(movement.tensors)) == (many, MOST_TENSORS)
    assert len(movement.only_in_b) == MOST_KEYS + 1
    assert movement.only_in_b[-1] == "... and 5 more"
