"""What becomes of the objects, tensors and values of a training's state, there and back."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lastgood import MissingKeysError, TargetMismatchError, make_sync_checkpointer
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import ConfigError
from lastgood.manager.state import StateTarget, state_dict_of
from lastgood.types import RankInfo


class Counter:
    """An object of the user's."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.loaded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "window": torch.full((4,), float(self.count))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.loaded += 1
        assert torch.equal(state["window"], torch.full((4,), float(self.count)))


def model(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))


def restore(path: Path, state: dict[str, Any], *, strict: bool = True) -> None:
    target = StateTarget(state)
    _, missing = CheckpointReader(RankInfo(0, 1)).read(
        str(path), target.target, check_keys=target.check_keys if strict else None
    )
    target.put(target.target, missing, strict=strict)


def save(path: Path, state: dict[str, Any]) -> None:
    make_sync_checkpointer().save(str(path), state_dict_of(state))


def test_objects_are_asked_for_their_state_wherever_they_are() -> None:
    plain = {"a": [1, 2], "b": (3,)}
    state = {"counter": Counter(3), "nested": {"list": [Counter(4), 5], "tuple": (Counter(6), plain)}, "plain": plain}
    found = state_dict_of(state)
    assert found["counter"]["count"] == 3
    assert found["nested"]["list"][0]["count"] == 4
    assert found["nested"]["list"][1] == 5
    assert found["nested"]["tuple"][0]["count"] == 6
    assert found["plain"] is plain
    assert found["nested"]["tuple"][1] is plain
    assert isinstance(state["counter"], Counter)


def test_a_class_is_no_object_with_a_state() -> None:
    assert state_dict_of({"kind": Counter})["kind"] is Counter


def test_a_state_that_holds_itself_is_refused_by_key() -> None:
    state: dict[str, Any] = {"inner": {}}
    state["inner"]["again"] = state
    with pytest.raises(ConfigError, match=r"inner\.again"):
        state_dict_of(state)


def test_what_was_saved_comes_back_into_the_same_objects(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        net = model(seed)
        return {
            "model": net,
            "optimizer": torch.optim.AdamW(net.parameters(), lr=seed / 10),
            "counters": [Counter(seed), Counter(seed + 1)],
            "pair": (Counter(seed), {"count": seed}),
            "tensor": torch.full((3,), float(seed)),
            "epoch": seed,
            "history": {"loss": [float(seed)] * seed},
            "names": ["a"] * seed,
            "ordered": OrderedDict(x=seed),
        }

    saved, state = make(5), make(1)
    saved["model"](torch.rand(4, 8)).sum().backward()
    saved["optimizer"].step()
    before = {key: state[key] for key in ("model", "optimizer", "counters", "tensor", "history", "names")}
    weight, history = state["model"][0].weight, state["history"]
    save(tmp_path, saved)
    restore(tmp_path, state)
    assert all(state[key] is value for key, value in before.items())
    assert state["model"][0].weight is weight
    for name, value in saved["model"].state_dict().items():
        assert torch.equal(state["model"].state_dict()[name], value)
    for index, entry in saved["optimizer"].state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(state["optimizer"].state_dict()["state"][index][name], value)
    assert state["optimizer"].param_groups[0]["lr"] == 0.5
    assert [counter.count for counter in state["counters"]] == [5, 6]
    assert state["pair"][0].count == 5
    assert state["pair"][1] == {"count": 5}
    assert torch.equal(state["tensor"], torch.full((3,), 5.0))
    assert (state["epoch"], state["names"], dict(state["ordered"])) == (5, ["a"] * 5, {"x": 5})
    assert history == {"loss": [5.0] * 5}


@pytest.mark.parametrize("strict", [True, False])
def test_a_key_that_was_not_saved_is_named_or_left_alone(tmp_path: Path, strict: bool) -> None:
    save(tmp_path, {"model": model(5), "epoch": 5})
    state = {"model": model(1), "epoch": 1, "counter": Counter(9), "new": {"counter": Counter(8), "value": 7}}
    weight = state["model"][0].weight.detach().clone()
    if strict:
        with pytest.raises(MissingKeysError, match="counter") as caught:
            restore(tmp_path, state)
        assert caught.value.missing_keys == ("counter", "new")
        assert torch.equal(state["model"][0].weight, weight)
        assert state["epoch"] == 1
        return
    restore(tmp_path, state, strict=False)
    assert torch.equal(state["model"][0].weight, model(5)[0].weight)
    assert state["epoch"] == 5
    assert (state["counter"].count, state["counter"].loaded) == (9, 0)
    assert (state["new"]["counter"].count, state["new"]["value"]) == (8, 7)


def test_a_model_with_fewer_tensors_than_were_saved_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(5), "extra": 1})
    state = {"model": model(1)[:1]}
    weight = state["model"][0].weight.detach().clone()
    with pytest.raises(TargetMismatchError, match=r"model\.1\.weight"):
        restore(tmp_path, state)
    assert torch.equal(state["model"][0].weight, weight)
    restore(tmp_path, state, strict=False)
    assert torch.equal(state["model"][0].weight, model(5)[0].weight)


def test_what_the_state_does_not_name_stays_in_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(5), "ema": model(6), "epoch": 2})
    state = {"model": model(1)}
    restore(tmp_path, state)
    assert torch.equal(state["model"][0].weight, model(5)[0].weight)
    assert set(state) == {"model"}


def test_an_object_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    class Refusing(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("no")

    save(tmp_path, {"first": Counter(1), "second": Counter(2)})
    with pytest.raises(KeyError) as caught:
        restore(tmp_path, {"first": Counter(), "second": Refusing()})
    assert "Refusing at the key 'second'" in caught.value.__notes__[0]


def test_a_value_of_another_kind_takes_the_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    save(tmp_path, {"value": [1, 2], "other": {"a": 1}})
    state: dict[str, Any] = {"value": {"not": "a list"}, "other": None}
    restore(tmp_path, state)
    assert state == {"value": [1, 2], "other": {"a": 1}}
