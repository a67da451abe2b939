"""Kinds of values that deserve a name: each saved to a real file, and compared with what torch brings back."""

import argparse
import collections
import copy
import copyreg
import dataclasses
import enum
import functools
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.capture.comparing import assert_same
from tests.unit.capture.files import is_safe, loaded_by_torch, loaded_by_us, save_and_listen

import lastgood
from lastgood.errors import UnsafeCheckpointError, UnsafeValueWarning
from lastgood.format.spec import MAX_INDEX_DEPTH

pytestmark = [
    # What torch says when such tensors are made, or loaded again.
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Labelled(torch.Tensor):
    """A tensor subclass as users write them."""


class Flavour(enum.Enum):
    STRANGE = 3


@dataclasses.dataclass
class Progress:
    step: int
    history: list[int]


class Settings(dict[str, Any]):
    """A dict as users extend it."""


class Losses(list[float]):
    """A list as users extend it."""


class Votes(Counter[str]):
    """A counter as users extend it; Python makes it at once, from a plain dict."""


class Ordered(OrderedDict[str, Any]):
    """An ordered dict as users extend it."""


class Renamed(dict[str, Any]):
    """A dict that pickles as one of torch's own kind."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


Point = collections.namedtuple("Point", "x y")


def check(state: Any, folder: Path) -> None:
    """Comes back as from torch.save, safely where torch's own file loads safely; warned of where it does not."""
    ours, theirs = folder / "ours.pt", folder / "theirs.pt"
    warnings = save_and_listen(state, ours)
    torch.save(state, theirs)
    safe = is_safe(theirs)
    assert bool(warnings) == (not safe)
    for loaded in loaded_by_torch(ours, safe=safe):
        assert_same(loaded, torch.load(theirs, weights_only=safe))
    if safe:
        for loaded in loaded_by_us(ours):
            assert_same(loaded, torch.load(theirs, weights_only=True))


def values() -> torch.Tensor:
    return torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7 - 1


def with_attributes(tensor: torch.Tensor) -> torch.Tensor:
    tensor.partition = {"axis": 0, "owners": [1, 2]}  # type: ignore[attr-defined]
    tensor.twin = torch.ones(2)  # type: ignore[attr-defined]
    return tensor


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 4), torch.zeros(3, 4)], layout=torch.jagged)


SCALES, ZEROS = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 2, 3])

SPECIAL_TENSORS: dict[str, Callable[[], Any]] = {
    "quantised, a tensor at a time": lambda: torch.quantize_per_tensor(values(), 0.1, 3, torch.quint8),
    "quantised, a part of one": lambda: torch.quantize_per_tensor(values(), 0.1, 3, torch.qint32)[1:3, 2:],
    "quantised, transposed": lambda: torch.quantize_per_tensor(values(), 0.1, 3, torch.qint8).t(),
    "quantised, a channel at a time": lambda: torch.quantize_per_channel(values(), SCALES, ZEROS, 0, torch.qint8),
    "quantised, channels with float zero points": lambda: torch.quantize_per_channel(
        values(), SCALES, ZEROS.float(), 0, torch.quint8
    ),
    "quantised to 4 bits": lambda: torch.quantize_per_channel(values(), SCALES, ZEROS.float(), 0, torch.quint4x2),
    "quantised to 2 bits": lambda: torch.quantize_per_tensor(values(), 0.1, 3, torch.quint2x4),
    "sparse COO": lambda: values().relu().to_sparse().coalesce(),
    "sparse COO that requires grad": lambda: values().relu().to_sparse().coalesce().requires_grad_(),
    "sparse COO with dense parts": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.ones(2, 3), (4, 3), is_coalesced=True, check_invariants=True
    ),
    "sparse CSR": lambda: values().relu().to_sparse_csr(),
    "sparse CSC": lambda: values().relu().to_sparse_csc(),
    "sparse BSR": lambda: values().relu().to_sparse_bsr((2, 3)),
    "sparse BSC": lambda: values().relu().to_sparse_bsc((2, 3)),
    "nested, strided": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.strided),
    "nested, jagged": jagged,
    "a tensor subclass": lambda: values().as_subclass(Labelled),
    "a view of a tensor subclass": lambda: values().as_subclass(Labelled)[1:3, ::2],
    "a tensor with attributes": lambda: with_attributes(values()),
    "a tensor with attributes that requires grad": lambda: with_attributes(values().requires_grad_()),
    "a Parameter with attributes": lambda: with_attributes(torch.nn.Parameter(values())),
    "a frozen Parameter with attributes": lambda: with_attributes(torch.nn.Parameter(values(), requires_grad=False)),
    "a Buffer": lambda: torch.nn.Buffer(values()),
    "a raw storage": lambda: values().untyped_storage(),
    "float4": lambda: torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "70 dimensions": lambda: torch.ones([1] * 70),
    "a hole in the middle": lambda: torch.arange(100)[::33],
}


@pytest.mark.parametrize("name", SPECIAL_TENSORS)
def test_a_special_tensor_comes_back_as_from_torch_save(name: str, tmp_path: Path) -> None:
    tensor = SPECIAL_TENSORS[name]()
    check({"layers": [tensor, {"again": tensor}], "plain": torch.ones(3)}, tmp_path)


@pytest.mark.parametrize("layout", ["sparse COO", "sparse CSR", "quantised, a channel at a time", "nested, jagged"])
def test_parts_of_special_tensors_share_memory_with_plain_ones(layout: str, tmp_path: Path) -> None:
    tensor = SPECIAL_TENSORS[layout]()
    part = tensor.q_per_channel_scales() if tensor.is_quantized else tensor.values()
    check({"before": part[1:], "whole": tensor, "after": part[:1]}, tmp_path)


def test_memory_that_tensors_use_as_different_dtypes(tmp_path: Path) -> None:
    # torch.save refuses such a state: what comes back is compared with the state itself.
    memory = torch.arange(96, dtype=torch.uint8)
    state = {
        "bytes": memory[19:70],
        "halves": torch.nn.Parameter(memory.view(torch.bfloat16)[13:20:3]),
        "floats": memory.view(torch.float32)[7:].requires_grad_(),
        "scaled": memory.view(torch.float8_e5m2)[21:22].requires_grad_(),
        "complex": memory.view(torch.complex64)[3:5].conj(),
        "negative": memory.view(torch.complex128)[2:3].conj().imag,
    }
    assert save_and_listen(state, tmp_path / "file.pt") == []
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert_same(loaded, state)
        assert loaded["floats"].untyped_storage().nbytes() == 96 - 16, "the span, from where all dtypes can count"


def test_dtypes_whose_gradients_torch_cannot_load(tmp_path: Path) -> None:
    state = {
        str(dtype): torch.zeros(3, dtype=dtype).requires_grad_()
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32)
    }
    lastgood.save(state, tmp_path / "file.pt")
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert_same(loaded, state)


def test_empty_memory_may_be_of_any_dtype(tmp_path: Path) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    empty = torch.sparse_coo_tensor(torch.empty(1, 0), nothing.view(torch.float32), (5,), check_invariants=True)
    special = nothing.view(torch.float16)
    special.note = "opaque"  # type: ignore[attr-defined]
    check(
        {"sparse": empty.coalesce(), "plain": nothing, "special": special, "bytes": nothing.view(torch.uint8)}, tmp_path
    )


def test_uncoalesced_sparse_tensors_stay_uncoalesced(tmp_path: Path) -> None:
    tensor = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 0]]), torch.tensor([1.0, 2.0, 3.0]), (3,), check_invariants=True
    )
    lastgood.save({"gradient": tensor}, tmp_path / "file.pt")
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert not loaded["gradient"].is_coalesced()
        assert loaded["gradient"].to_dense().tolist() == [3.0, 3.0, 0.0]


def test_a_real_training_state_comes_back_and_trains_on_the_same(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.arange(12.0).reshape(3, 4)).square().sum().backward()
        optimizer.step()
        schedule.step()

    step()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = {name: part.state_dict() for name, part in parts.items()} | {"epoch": 1, "rng": torch.get_rng_state()}
    check(state, tmp_path)
    step()
    expected = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    loaded = lastgood.load(tmp_path / "ours.pt")
    for name, part in parts.items():
        part.load_state_dict(loaded[name])
    step()
    assert_same({name: part.state_dict() for name, part in parts.items()}, expected)


def test_a_parameter_in_the_optimizer_state_stays_the_model_s(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    state = {
        "model": OrderedDict(weight=weight.detach(), tied=weight),
        "optimizer": {"state": {0: {"master": weight, "slow": weight.data[1:]}, weight: {"step": 3}}},
    }
    check(state, tmp_path)


# Structure


def test_a_list_that_contains_itself(tmp_path: Path) -> None:
    endless: list[Any] = [1, torch.ones(2)]
    endless.append({"inner": (endless,)})
    lastgood.save({"endless": endless, "first": endless[1]}, tmp_path / "file.pt")
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert loaded["endless"][2]["inner"][0] is loaded["endless"]
        assert loaded["endless"][1] is loaded["first"]
        assert loaded["first"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("save", [lastgood.save, torch.save])
def test_parts_of_a_state_that_contains_itself_load_into_a_target(save: Any, tmp_path: Path) -> None:
    state: dict[str, Any] = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    state["self"] = {"again": state}
    save(state, tmp_path / "file.pt")
    weight = torch.zeros(2)
    target = {"weight": weight, "self": None}
    assert lastgood.load(tmp_path / "file.pt", target) is target
    assert weight.tolist() == [1.0, 1.0]
    again: Any = target["self"]
    assert again["again"]["self"] is again


def test_a_dict_that_is_its_own_attribute(tmp_path: Path) -> None:
    state: OrderedDict[str, Any] = OrderedDict(weight=torch.ones(2))
    state.owner = state  # type: ignore[attr-defined]
    lastgood.save(state, tmp_path / "file.pt")
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert loaded.owner is loaded
        assert loaded["weight"].tolist() == [1.0, 1.0]


def test_lists_that_each_hold_the_one_before_twice(tmp_path: Path) -> None:
    # Written out in full, it would be 2 to the power of 60 times as large.
    doubled: list[Any] = [torch.ones(2), "innermost"]
    for _ in range(60):
        doubled = [doubled, doubled]
    lastgood.save({"doubled": doubled}, tmp_path / "file.pt")
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        left = right = loaded["doubled"]
        for _ in range(60):
            left, right = left[0], right[1]
        assert left[0] is right[0]
        assert left[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", [list, tuple, dict, set])
@pytest.mark.parametrize("depth", [MAX_INDEX_DEPTH - 2, MAX_INDEX_DEPTH - 1, MAX_INDEX_DEPTH, MAX_INDEX_DEPTH + 50])
def test_nesting_around_and_beyond_what_the_index_describes(kind: type, depth: int, tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    if kind is set:
        nested: Any = "innermost"
        for _ in range(depth):
            nested = (nested,)
        nested = {nested}
    else:
        nested = [shared[1:]]
        for _ in range(depth):
            nested = {"inner": nested} if kind is dict else kind([nested])
    check({"nested": nested, "shared": shared}, tmp_path)


def test_nesting_deeper_than_python_can_follow_is_refused(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(lastgood.errors.UnsupportedStateError, match="recursion"):
        lastgood.save({"nested": nested}, tmp_path / "file.pt")
    assert not any(tmp_path.iterdir())
    while nested:  # Python would free it by recursion too
        nested = nested.pop()


@pytest.mark.parametrize("state", [torch.ones(3), [1, 2], (), None, 3.5, "text", torch.nn.Parameter(torch.ones(2))])
def test_a_state_need_not_be_a_dict(state: Any, tmp_path: Path) -> None:
    check(state, tmp_path)


def test_objects_that_two_opaque_values_share_stay_shared(tmp_path: Path) -> None:
    common, weight = [1, 2], torch.arange(4.0)
    state = {
        "one": argparse.Namespace(common=common, tail=weight[2:]),
        "two": Counter(a=1),
        "three": argparse.Namespace(common=common, head=weight[:2]),
        "weight": weight,
    }
    with pytest.warns(UnsafeValueWarning):
        lastgood.save(state, tmp_path / "file.pt")
    for loaded in loaded_by_torch(tmp_path / "file.pt", safe=False):
        assert loaded["one"].common is loaded["three"].common
        loaded["weight"][:] = 7
        assert loaded["one"].tail.tolist() == loaded["three"].head.tolist() == [7.0, 7.0]


# Values that a safe load refuses

UNSAFE: dict[str, tuple[Any, str]] = {
    "namespace": (argparse.Namespace(lr=0.1, layers=[1, 2]), "argparse.Namespace"),
    "dataclass": (Progress(3, [1, 2]), f"{Progress.__module__}.Progress"),
    "numpy array": (np.arange(6).reshape(2, 3), "numpy"),
    "numpy scalar": (np.float64(2.5), "numpy"),
    "partial": (functools.partial(int, base=2), "functools.partial"),
    "enum": (Flavour.STRANGE, f"{Flavour.__module__}.Flavour"),
    "defaultdict": (defaultdict(list, a=[1]), "collections.defaultdict"),
    "named tuple": (Point(1, 2), f"{Point.__module__}.Point"),
    "frozenset": (frozenset({1, 2}), "frozenset"),
    "path": (Path("some/where"), "pathlib"),
    "function": (copy.deepcopy, "copy.deepcopy"),
}


def comparable(value: Any) -> Any:
    """The value in a form in which == compares all of it."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.mark.parametrize("name", UNSAFE)
def test_a_value_that_a_safe_load_refuses_is_warned_of_by_its_key(name: str, tmp_path: Path) -> None:
    value, named = UNSAFE[name]
    path = tmp_path / "file.pt"
    with pytest.warns(UnsafeValueWarning) as caught:
        lastgood.save({"config": [0, {name: value}], "weight": torch.ones(2)}, path)
    (warning,) = caught
    assert f"'config[1].{name}'" in str(warning.message)
    assert named in str(warning.message)
    assert warning.filename == __file__, "the warning names the line that called save"
    for loaded in loaded_by_torch(path, safe=False):
        assert type(loaded["config"][1][name]) is type(value)
        assert comparable(loaded["config"][1][name]) == comparable(value)
    assert not is_safe(path)
    with pytest.raises(UnsafeCheckpointError):
        lastgood.load(path)


@pytest.mark.parametrize(
    "value",
    [
        Counter("abca"),
        torch.Size([2, 3]),
        torch.device("cuda:1"),
        torch.bfloat16,
        {(1, "a"), None, b"x"},
        bytearray(b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_a_safe_load_takes_is_not_warned_of(value: Any, tmp_path: Path) -> None:
    assert save_and_listen({"value": value}, tmp_path / "file.pt") == []
    for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
        assert_same(loaded["value"], value)


def test_an_allowed_class_is_not_warned_of_and_loads(tmp_path: Path) -> None:
    value = argparse.Namespace(lr=0.1, weight=torch.ones(2))
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert save_and_listen({"value": value}, tmp_path / "file.pt") == []
        for loaded in (*loaded_by_torch(tmp_path / "file.pt", safe=True), *loaded_by_us(tmp_path / "file.pt")):
            assert_same(vars(loaded["value"]), vars(value))


UNFILLABLE = [
    (Settings(lr=0.1), Settings),
    (Losses([1.0]), Losses),
    (Ordered(lr=0.1), Ordered),
    (deque([1, 2]), deque),
    (defaultdict(list, a=[1]), defaultdict),
    (argparse.Namespace(recent=deque([1], maxlen=3)), deque),
]


@pytest.mark.parametrize(("value", "kind"), UNFILLABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_items_that_no_allow_list_helps_are_warned_of(value: Any, kind: type, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with torch.serialization.safe_globals([type(value), kind, list]):
        # The second value shares the first one's object: it is warned of too.
        warnings = save_and_listen({"config": value, "again": argparse.Namespace(value=value)}, path)
        assert ["'config'" in warning for warning in warnings] == [True, False]
        assert ["'again'" in warning for warning in warnings] == [False, True]
        for warning in warnings:
            assert "whatever is allowed" in warning
            assert "unless" not in warning
            assert f"{kind.__module__}.{kind.__qualname__}" in warning
            assert "dict(value) or list(value)" in warning
        save_and_listen({"config": value}, path)
        with pytest.raises(pickle.UnpicklingError, match=r"Can only (SETITEM|append to|extend)"):
            torch.load(path, weights_only=True)
        with pytest.raises(UnsafeCheckpointError):
            lastgood.load(path)


@pytest.mark.parametrize(
    "value",
    [Settings(), Losses(), deque(), defaultdict(list), Votes("abca"), Renamed(lr=0.1)],
    ids=lambda value: type(value).__name__,
)
def test_allowed_classes_without_items_to_put_in_load(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with torch.serialization.safe_globals([type(value), list]):
        assert save_and_listen({"value": value}, path) == []
        for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
            assert loaded["value"] == value


def repeating() -> dict[str, torch.Tensor]:
    """Tensors that have more elements than memory, in parts that the index does not describe."""
    one = torch.ones(1)
    quantised = torch.quantize_per_tensor(torch.ones(1, 4), 0.5, 0, torch.qint8).expand(3, 4)
    named = quantised.expand(3, 4)
    named.label = "scale"  # type: ignore[attr-defined]
    return {
        "values": torch.sparse_coo_tensor(torch.tensor([[0, 1]]), one.expand(2), (3,)),
        "indices": torch.sparse_coo_tensor(torch.tensor([[0]]).expand(2, 3), torch.ones(3), (3, 3)),
        "rows": torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), one.expand(2), (2, 2)),
        "parameter": torch.nn.Parameter(torch.sparse_coo_tensor(torch.tensor([[0, 1]]), one.expand(2), (3,))),
        "gradient": torch.sparse_csr_tensor([0, 1, 2], [0, 1], one.expand(2), (2, 2)).requires_grad_(),
        "quantised": quantised,
        "quantised parameter": torch.nn.Parameter(quantised, requires_grad=False),
        "quantised with attributes": named,
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    "name",
    [
        "values",
        "indices",
        "rows",
        "parameter",
        "gradient",
        "quantised",
        "quantised parameter",
        "quantised with attributes",
    ],
)
def test_expanded_parts_of_special_tensors_load_again(name: str, tmp_path: Path) -> None:
    value, path = repeating()[name], tmp_path / "file.pt"
    assert save_and_listen({"value": value}, path) == []
    for loaded in (*loaded_by_torch(path, safe=True), *loaded_by_us(path)):
        found = loaded["value"]
        assert type(found) is type(value)
        for attribute in ("layout", "is_quantized", "requires_grad", "__dict__"):
            assert getattr(found, attribute) == getattr(value, attribute)
        plain = torch.Tensor.dequantize if value.is_quantized else torch.Tensor.to_dense
        assert torch.equal(plain(found), plain(value))


def test_a_class_that_pickle_names_by_a_number_is_warned_of(tmp_path: Path) -> None:
    copyreg.add_extension(Progress.__module__, "Progress", 240)  # a code that Python leaves to private use
    try:
        (warning,) = save_and_listen({"progress": Progress(1, [])}, tmp_path / "file.pt")
        assert "'progress'" in warning
        assert "whatever is allowed" in warning
        assert torch.load(tmp_path / "file.pt", weights_only=False) == {"progress": Progress(1, [])}
    finally:
        copyreg.remove_extension(Progress.__module__, "Progress", 240)


def test_an_unsafe_key_is_warned_of_by_its_path(tmp_path: Path) -> None:
    (warning,) = save_and_listen({"steps": {np.int64(3): "three"}}, tmp_path / "file.pt")
    assert "'steps.3'" in warning
    assert torch.load(tmp_path / "file.pt", weights_only=False) == {"steps": {3: "three"}}


def test_a_key_that_python_refuses_to_print(tmp_path: Path) -> None:
    state = {10**5000: {"value": torch.ones(1)}}
    lastgood.save(state, tmp_path / "file.pt")
    assert lastgood.load(tmp_path / "file.pt") == state
