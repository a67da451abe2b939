"""Loads into lists, tuples and dicts: the tensors given in them are filled, or the load is refused."""

import itertools
from collections import defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.loading.files import opened

import lastgood
from lastgood._loading.file import load_file
from lastgood.errors import MissingKeysError, TargetMismatchError

Pair = namedtuple("Pair", "first second")

SAVERS = {"ours": lastgood.save, "torch's": torch.save}


@pytest.fixture(params=list(SAVERS))
def save(request: pytest.FixtureRequest) -> Callable[[Any, Path], None]:
    return SAVERS[request.param]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


def ones() -> torch.Tensor:
    return torch.ones(2)


def zeros() -> torch.Tensor:
    return torch.zeros(2)


def load(file: Path, target: Any) -> tuple[Any, list[str]]:
    with opened(file) as stored:
        return load_file(stored, target)


# Lists and tuples


@pytest.mark.parametrize("saved_kind", [list, tuple])
@pytest.mark.parametrize("target_kind", [list, tuple])
def test_lists_and_tuples_are_matched_with_each_other(
    file: Path, save: Any, saved_kind: type, target_kind: type
) -> None:
    """The tensors are filled, a list stays the same list, a tuple is followed by a tuple, whatever was saved."""
    save({"a": saved_kind([ones(), saved_kind([2 * ones(), "x"]), 7, 3 * ones()])}, file)
    outer_tensor, inner_tensor = zeros(), zeros()
    inner = target_kind([inner_tensor, None])
    outer = target_kind([outer_tensor, inner, 1])
    target = {"a": outer}

    _, missing = load(file, target)

    assert missing == []
    assert torch.equal(outer_tensor, ones())
    assert torch.equal(inner_tensor, 2 * ones())
    result = target["a"]
    assert type(result) is target_kind
    assert type(result[1]) is target_kind
    if target_kind is list:
        assert result is outer
        assert result[1] is inner
    assert result[0] is outer_tensor
    assert result[1][0] is inner_tensor
    assert (result[1][1], result[2]) == ("x", 7)
    assert torch.equal(result[3], 3 * ones())
    assert len(result) == 4


@pytest.mark.parametrize("saved_kind", [list, tuple])
@pytest.mark.parametrize("target_kind", [list, tuple])
def test_positions_beyond_the_saved_ones_are_missing_and_stay(
    file: Path, save: Any, saved_kind: type, target_kind: type
) -> None:
    save({"a": saved_kind([ones()])}, file)
    first, second, rest = zeros(), zeros(), (zeros(), {"deep": 1})
    target = {"a": target_kind([first, second, rest])}

    _, missing = load(file, target)

    assert missing == ["a[1]", "a[2]"]
    assert torch.equal(first, ones())
    assert type(target["a"]) is target_kind
    assert len(target["a"]) == 3
    assert target["a"][0] is first
    assert target["a"][1] is second
    assert target["a"][2] is rest
    assert torch.equal(second, zeros())
    with pytest.raises(MissingKeysError, match=r"a\[1\]"):
        lastgood.load(file, target, strict=True)


def test_a_list_is_the_target_of_a_saved_tuple_at_the_top_as_well(file: Path) -> None:
    lastgood.save((ones(), 5), file)
    tensor = zeros()
    target = [tensor, None, "more"]
    loaded, missing = load(file, target)
    assert loaded is target
    assert missing == ["[2]"]
    assert target[0] is tensor
    assert torch.equal(tensor, ones())
    assert target[1:] == [5, "more"]
    loaded, missing = load(file, (tensor, None))
    assert type(loaded) is tuple
    assert loaded[0] is tensor
    assert loaded[1] == 5


# Containers of another kind


@pytest.mark.parametrize(
    "saved", [5, None, "x", ones(), {1, 2}, torch.Size([2]), {"w": ones()}], ids=lambda saved: type(saved).__name__
)
@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: [tensor],
        lambda tensor: (tensor,),
        lambda tensor: ["x", {"deep": (1, [tensor])}],
        lambda tensor: Pair(tensor, 1),
    ],
    ids=["list", "tuple", "deep", "named"],
)
def test_a_container_with_tensors_is_never_replaced(file: Path, save: Any, saved: Any, make: Any) -> None:
    save({"good": ones(), "in": {"a": saved}, "number": 1}, file)
    good, tensor = zeros(), zeros()
    container = make(tensor)
    target = {"good": good, "in": {"a": container}, "number": 2}

    with pytest.raises(TargetMismatchError, match=r"'in\.a'.*Nothing has been changed") as caught:
        lastgood.load(file, target)

    assert caught.value.tensor == "in.a"
    assert target["in"]["a"] is container
    assert target["number"] == 2
    assert torch.equal(good, zeros())
    assert torch.equal(tensor, zeros())


@pytest.mark.parametrize("saved", [5, [ones()], (ones(),), ones()], ids=lambda saved: type(saved).__name__)
@pytest.mark.parametrize("kind", [dict, lambda **items: defaultdict(list, **items)], ids=["dict", "defaultdict"])
def test_a_mapping_with_tensors_is_never_replaced(file: Path, save: Any, saved: Any, kind: Any) -> None:
    save({"a": saved}, file)
    tensor = zeros()
    container = kind(w=tensor)
    target = {"a": container}
    with pytest.raises(TargetMismatchError, match="'a'"):
        lastgood.load(file, target)
    assert target["a"] is container
    assert torch.equal(tensor, zeros())


@pytest.mark.parametrize("container", [{"w": 1}, [1, {"x": None}], (1, (2,)), {}, [], ()], ids=repr)
@pytest.mark.parametrize("saved", [5, ones()], ids=["number", "tensor"])
def test_a_container_without_tensors_is_replaced(file: Path, save: Any, saved: Any, container: Any) -> None:
    save({"a": saved}, file)
    target = {"a": container}
    lastgood.load(file, target)
    assert torch.equal(torch.as_tensor(target["a"]), torch.as_tensor(saved))


def test_containers_that_hold_themselves_are_searched_once(file: Path) -> None:
    lastgood.save({"a": 5}, file)
    without: list[Any] = [1]
    without.append({"again": (without,)})
    target: dict[str, Any] = {"a": without}
    lastgood.load(file, target)
    assert target["a"] == 5

    deep: Any = zeros()
    for _ in range(10_000):
        deep = [deep, deep]  # doubles what a search that forgets would go through, and is too deep for recursion
    with pytest.raises(TargetMismatchError, match="'a'"):
        lastgood.load(file, {"a": deep})
    while isinstance(deep, list):
        deep = deep[0]  # taken apart here, as freeing it at once would recurse


# Overlapping memory


@pytest.mark.parametrize("order", list(itertools.permutations(["whole", "again", "third", "part"])), ids="-".join)
def test_the_last_of_overlapping_targets_wins_if_some_are_tied(file: Path, order: tuple[str, ...]) -> None:
    """Tied targets are read once only where nothing else overlaps them."""
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    state = {"whole": weight, "again": weight, "third": weight, "part": torch.tensor([9.0, 9.0])}
    lastgood.save({name: state[name] for name in order} | {"aside": weight + 1}, file)
    memory, aside = torch.zeros(4), torch.zeros(4)
    views = {"whole": memory, "again": memory, "third": memory[:], "part": memory[:2]}
    lastgood.load(file, {name: views[name] for name in order} | {"aside": aside})
    assert memory.tolist() == ([9, 9, 3, 4] if order[-1] == "part" else [1, 2, 3, 4])
    assert torch.equal(aside, weight + 1)
