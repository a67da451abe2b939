"""A plan that is used again gives the file that a new one would give, byte for byte, whatever has changed meanwhile."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.asynchronous import (
    ELEMENTS,
    Gate,
    assert_equal,
    file_of_snapshot,
    file_of_synchronous_save,
    gate_before_copies,
)
from tests.helpers.workers import PATIENCE_SECS, Worker

from lastgood._staging import plan as plan_module
from lastgood._staging.job import StagingJob
from lastgood._staging.plan import Planner, Taken
from lastgood.errors import StagingError, TornSnapshotError, UnsupportedStateError
from lastgood.staging import CheckpointStagerConfig, DefaultStager

AT_ONCE, LATER = 20_000, 0
"""How many tensors are compared before a save returns: all of the small states here, or none."""


def synchronous() -> DefaultStager:
    return DefaultStager(CheckpointStagerConfig(use_async_staging=False))


def saved_by(stager: DefaultStager, state: Any) -> tuple[int, bytes]:
    """The number of the plan, and the file."""
    snapshot = stager.snapshot(state)
    try:
        return snapshot.placed.result(0).description.plan, file_of_snapshot(snapshot)
    finally:
        snapshot.release()


# Any change at all

PLAIN = [0, 1, True, False, 1.0, 0.0, -0.0, None, float("nan"), -float("nan"), float("inf"), 255, 256, 300, 65_536]
PLAIN += [-1, 2**31, 2**63, -(2**63) - 1, 2**200, "", "1", "a", "b", "long enough", "\xe9", "\ud800", "\udfff\x00"]
OTHERS = [b"", b"1", b"2", 1j, torch.Size([1, 2]), torch.Size([2, 1]), torch.float16, torch.int8, torch.device("cpu")]
KEYS = [0, 1, True, False, 1.0, 0.0, -0.0, None, "1", "a", "b", "weights", "\xe9", "\ud800", b"1", (1, 2), 2**70]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DTYPES = [*FLOATS, torch.int32, torch.uint8, torch.complex64]
SHAPES = [(), (1,), (4,), (2, 2), (2, 1, 2), (0,), (0, 3), (8,), (4, 2)]


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether its storage has not been resized to less than it needs."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + span) * tensor.element_size()
    return tensor.numel() == 0 or needed <= tensor.untyped_storage().nbytes()


class Playground:
    """A state of what hypothesis makes up, and changes to it of all kinds."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._tensors: list[torch.Tensor] = []
        self._count = 0
        self.state = self._container(0, [dict, OrderedDict])

    def _pick(self, choices: Any) -> Any:
        return choices[self._draw(st.integers(0, len(choices) - 1))]

    def _chance(self, one_in: int) -> bool:
        return self._draw(st.integers(1, one_in)) == 1

    # Making values

    def _container(self, depth: int, kinds: Sequence[Any] = (dict, dict, OrderedDict, list, tuple)) -> Any:
        kind = self._pick(kinds)
        values = [self._value(depth + 1) for _ in range(self._draw(st.integers(0, 4)))]
        if kind in (list, tuple):
            return kind(values)
        names = [f"name {number}" for number in range(4)]
        keys = self._draw(st.lists(st.sampled_from(names if self._chance(2) else KEYS), min_size=4, max_size=4))
        made = kind(zip(keys, values, strict=False))
        if kind is OrderedDict and self._chance(2):
            made._metadata = OrderedDict([("", {"version": self._pick(PLAIN)})])
        return made

    def _value(self, depth: int) -> Any:
        kind = self._draw(st.integers(0, 9))
        if kind < 5:
            return self._tensor()
        if kind < 7:
            return self._pick(PLAIN)
        if kind == 7:
            return self._pick(OTHERS)
        return self._container(depth) if depth < 3 else self._pick(PLAIN)

    def _tensor(self) -> torch.Tensor:
        if self._tensors and self._chance(3):
            made = self._alias(self._pick(self._tensors))
        else:
            self._count += 1
            made = torch.full(self._pick(SHAPES), self._count, dtype=self._pick(DTYPES))
            if made.dtype in FLOATS and self._chance(3):
                made = torch.nn.Parameter(made, requires_grad=self._chance(2))
        self._tensors.append(made)
        return made

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or another one on its memory."""
        ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda tensor: tensor,
            lambda tensor: tensor.detach(),
            lambda tensor: tensor.detach().reshape(-1)[1:],
            lambda tensor: tensor.detach().reshape(-1)[::2],
            lambda tensor: tensor.detach().reshape(-1)[:1].as_strided((1,), (5,)),
            lambda tensor: tensor.detach().t() if tensor.dim() == 2 else tensor.detach(),
            lambda tensor: tensor.detach().view(torch.uint8) if tensor.dim() else tensor.detach(),
            lambda tensor: tensor.detach().conj(),
            lambda tensor: torch._neg_view(tensor.detach()),
            lambda tensor: tensor.detach().expand(3, *tensor.shape),
        ]
        way = self._pick(ways)
        try:
            return way(tensor) if tensor.numel() and has_memory(tensor) else tensor.detach()
        except RuntimeError:
            return tensor.detach()  # torch does not do that to this tensor

    # Changing the state

    def change(self) -> None:
        changes = [
            self._change_data, self._change_data, self._change_tensor, self._change_tensor, self._replace, self._swap,
            self._tie, self._alias_place, self._rename, self._reorder, self._remove, self._insert, self._share,
            self._attributes, self._other_kind, self._note, self._replace_plain, self._replace_plain,
        ]  # fmt: skip
        self._pick(changes)()

    def _places(self, wanted: Callable[[Any], bool] = lambda value: True) -> list[tuple[Any, Any]]:
        """Containers and keys at which such values can be put."""
        found, seen, pending = [], set(), [self.state]
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
            if not isinstance(value, tuple):
                found += [(value, key) for key, item in items if wanted(item)]
            pending += [item for _, item in items if isinstance(item, (dict, list, tuple))]
            if isinstance(value, OrderedDict):
                pending += [item for item in vars(value).values() if isinstance(item, dict)]
        return found

    def _place(self, wanted: Callable[[Any], bool] = lambda value: True) -> Any:
        places = self._places(wanted)
        return self._pick(places) if places else (self.state, "new")

    def _change_data(self) -> None:
        if self._tensors:
            tensor = self._pick(self._tensors).detach()
            if has_memory(tensor) and tensor.is_contiguous():
                tensor.fill_(self._draw(st.integers(0, 99)))

    def _change_tensor(self) -> None:
        if not self._tensors:
            return
        tensor, other = self._pick(self._tensors), self._pick(self._tensors).detach()
        if not has_memory(other):
            other = torch.ones(4)
        ways: list[Callable[[], object]] = [
            lambda: tensor.requires_grad_(not tensor.requires_grad),
            lambda: setattr(tensor, "data", other.clone()),
            lambda: setattr(tensor, "data", other),
            lambda: setattr(tensor, "data", tensor.data.view(torch.int32)),
            lambda: tensor.detach().set_(other),
            lambda: tensor.data.resize_(self._pick(SHAPES)),
            lambda: tensor.data.untyped_storage().resize_(self._draw(st.sampled_from([0, 64, 4096]))),
            lambda: tensor.data.t_(),
            lambda: tensor.data.unsqueeze_(0),
            lambda: tensor.data.squeeze_(),
            lambda: tensor.data.as_strided_((1,), (self._draw(st.integers(0, 9)),)),
            lambda: setattr(tensor, "data", tensor.data.squeeze()),
            lambda: setattr(tensor, "data", tensor.data.reshape(-1)),
            lambda: setattr(tensor, "data", tensor.data.reshape(1, -1)),
            lambda: setattr(tensor, "data", tensor.data.as_strided((1,), (3,))),
            lambda: setattr(tensor, "data", torch._neg_view(tensor.data)),
        ]
        try:
            with torch.no_grad():
                self._pick(ways)()
        except (RuntimeError, TypeError):
            pass  # torch does not do that to this tensor

    def _replace(self) -> None:
        container, key = self._place()
        container[key] = self._value(2)

    def _replace_plain(self) -> None:
        container, key = self._place(lambda value: value is None or type(value) in (bool, int, float, str))
        container[key] = self._pick(PLAIN)

    def _swap(self) -> None:
        leaves = self._places(lambda value: not isinstance(value, (dict, list, tuple)))
        if leaves:
            (first, key), (second, other) = self._pick(leaves), self._pick(leaves)
            first[key], second[other] = second[other], first[key]

    def _tie(self) -> None:
        if self._tensors:
            container, key = self._place(lambda value: isinstance(value, torch.Tensor))
            container[key] = self._pick(self._tensors)

    def _alias_place(self) -> None:
        if self._tensors:
            container, key = self._place(lambda value: isinstance(value, torch.Tensor))
            container[key] = self._alias(self._pick(self._tensors))
            self._tensors.append(container[key])

    def _dict(self) -> Any:
        return self._pick([self.state, *(item for item, _ in self._places() if isinstance(item, dict))])

    def _rename(self) -> None:
        chosen = self._dict()
        names = {key: self._pick(KEYS) for key in chosen if self._chance(2)}
        items = [(names.get(key, key), value) for key, value in chosen.items()]
        chosen.clear()
        chosen.update(items)

    def _reorder(self) -> None:
        chosen = self._dict()
        for key in list(chosen)[:1]:
            chosen[key] = chosen.pop(key)

    def _remove(self) -> None:
        container, key = self._place()
        if key != "new":
            del container[key]

    def _insert(self) -> None:
        container, _ = self._place()
        if isinstance(container, list):
            container.append(self._value(2))
        else:
            container[self._pick(KEYS)] = self._value(2)

    def _share(self) -> None:
        holders = self._places(lambda value: isinstance(value, (dict, list, tuple)))
        if holders:
            container, key = self._pick(holders)
            self.state["shared"] = container[key]

    def _attributes(self) -> None:
        ordered = [item for item, _ in self._places() if isinstance(item, OrderedDict)]
        if ordered:
            chosen = self._pick(ordered)
            if self._chance(3):
                vars(chosen).clear()
            else:
                setattr(chosen, self._pick(["_metadata", "other"]), self._value(2))

    def _other_kind(self) -> None:
        container, key = self._place(lambda value: isinstance(value, (dict, list, tuple)))
        value = container.get(key) if isinstance(container, dict) else container[key]
        if isinstance(value, dict):
            container[key] = self._pick([dict, OrderedDict])(value)
        elif isinstance(value, (list, tuple)):
            container[key] = self._pick([list, tuple])(value)
        elif isinstance(value, torch.Tensor) and value.dtype in FLOATS:
            container[key] = torch.nn.Parameter(value.detach())

    def _note(self) -> None:
        if self._tensors and self._chance(3):
            self._pick(self._tensors).note = 1


@pytest.mark.timeout(600)
@settings(max_examples=300)
@given(data=st.data())
def test_a_plan_used_again_gives_what_a_new_one_gives(data: st.DataObject) -> None:
    playground = Playground(data.draw)
    with pytest.MonkeyPatch.context() as patch, synchronous() as stager:
        patch.setattr(plan_module, "_CHECKED_AT_ONCE", data.draw(st.sampled_from([AT_ONCE, LATER])))
        for _ in range(4):
            try:
                expected = file_of_synchronous_save(playground.state)
            except UnsupportedStateError:
                with pytest.raises(UnsupportedStateError):
                    stager.stage(playground.state)
            else:
                _, found = saved_by(stager, playground.state)
                assert (found == expected) is True, "another file"
                assert_equal(stager.stage(playground.state), playground.state)
            for _ in range(data.draw(st.integers(0, 3))):
                playground.change()


# Single changes, each as small as can be


def base_state() -> dict[str, Any]:
    base = torch.arange(32, dtype=torch.float32)
    module = OrderedDict(weight=torch.ones(2, 2), bias=torch.ones(2))
    module._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return {
        "a": base[:8].clone(),
        "b": torch.ones(8),
        "one": torch.ones(1),
        "complex": torch.ones(4, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(4)),
        "tied": [base, base],
        "views": [base[:8], base[8:16]],
        "empty": torch.empty(0, 3),
        "step": 1,
        "rate": 0.5,
        "zero": 0.0,
        "lists": [[1], [1]],
        "name": "abc",
        "module": module,
        "tuple": (1, [2, 3.0]),
        1: {"key": None},
        "size": torch.Size([1, 2]),
        "bytes": b"12",
    }


def put(key: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(key, value)


def rename(key: Any, other: Any) -> Callable[[dict[str, Any]], None]:
    """Of all keys in their order."""

    def change(state: dict[str, Any]) -> None:
        items = [(other if each is key else each, value) for each, value in state.items()]
        state.clear()
        state.update(items)

    return change


REUSED: dict[str, Callable[[Any], object]] = {
    "nothing": lambda state: None,
    "data": lambda state: state["a"].fill_(7),
    "another tensor": lambda state: put("a", torch.full((8,), 5.0))(state),
    "the same by .data": lambda state: setattr(state["b"], "data", torch.full((8,), 5.0)),
    "a plain value of one pickled size": put("step", 2),
    "a float": put("rate", 1e-300),
    "the sign of zero": put("zero", -0.0),
    "a nan": put("rate", float("nan")),
    "a text of one length": put("name", "xyz"),
    "a text that JSON cannot hold": put("name", "\ud800"),
    "an attribute": lambda state: state["module"]._metadata[""].update(version=2),
    "a list in a tuple": lambda state: state["tuple"][1].__setitem__(0, 9),
    "a value under a key that is no text": lambda state: state[1].update(key=None),
}
MADE_ANEW: dict[str, Callable[[Any], object]] = {
    "True for 1": put("step", True),
    "1.0 for 1": put("step", 1.0),
    "a longer text": put("name", "abcd"),
    "a larger number": put("step", 70_000),
    "dtype": put("a", torch.ones(8, dtype=torch.int32)),
    "dtype by .data": lambda state: setattr(state["a"], "data", state["a"].view(torch.int32)),
    "shape": lambda state: state["a"].resize_(2, 4),
    "length": put("a", torch.ones(9)),
    "strides": lambda state: put("a", torch.ones(16)[::2])(state),
    "strides of one element": lambda state: state["one"].as_strided_((1,), (7,)),
    "requires_grad": lambda state: state["parameter"].requires_grad_(False),
    "no parameter": lambda state: put("parameter", torch.ones(4))(state),
    "untied": lambda state: state["tied"].__setitem__(1, state["tied"][0].clone()),
    "two objects on one memory": lambda state: state["tied"].__setitem__(1, state["tied"][0].detach()),
    "tied": lambda state: put("b", state["a"])(state),
    "no views of one memory": lambda state: state["views"].__setitem__(1, state["views"][1].clone()),
    "another place in that memory": lambda state: state["views"].__setitem__(1, state["tied"][0][9:17]),
    "set_": lambda state: state["b"].set_(state["a"].untyped_storage(), 0, (8,), (1,)),
    "another empty shape": put("empty", torch.empty(3, 0)),
    "a key": rename("a", "c"),
    "a key of another type": rename(1, True),
    "one list twice for two lists": lambda state: state["lists"].__setitem__(1, state["lists"][0]),
    "order": lambda state: put("a", state.pop("a"))(state),
    "one more": put("new", 1),
    "one less": lambda state: state.pop("step"),
    "a dict for an OrderedDict": lambda state: put("module", dict(state["module"]))(state),
    "no attributes": lambda state: vars(state["module"]).clear(),
    "more attributes": lambda state: setattr(state["module"], "more", 1),
    "a longer list": lambda state: state["tuple"][1].append(1),
    "a list for a tuple": put("tuple", [1, [2, 3.0]]),
    "a shared container": lambda state: put("shared", state["module"])(state),
    "a torch.Size": put("size", torch.Size([2, 1])),
    "bytes": put("bytes", b"21"),
    "an attribute of a tensor": lambda state: setattr(state["a"], "note", 1),
    "the conjugate bit": lambda state: put("complex", state["complex"].conj())(state),
    "the negative bit": lambda state: put("a", torch._neg_view(state["a"]))(state),
}


@pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning")
@pytest.mark.parametrize("checked", [AT_ONCE, LATER])
@pytest.mark.parametrize("change", [*REUSED, *MADE_ANEW])
def test_what_changed_decides_whether_the_plan_is_used_again(
    monkeypatch: pytest.MonkeyPatch, change: str, checked: int
) -> None:
    monkeypatch.setattr(plan_module, "_CHECKED_AT_ONCE", checked)
    state = base_state()
    with synchronous() as stager:
        first, _ = saved_by(stager, state)
        (REUSED | MADE_ANEW)[change](state)
        second, found = saved_by(stager, state)
        assert (found == file_of_synchronous_save(state)) is True, "another file"
        assert_equal(stager.stage(state), state)
        assert (second == first) is (change in REUSED)


def test_a_key_of_zero_is_not_one_of_minus_zero() -> None:
    with synchronous() as stager:
        for key in (0.0, -0.0, 0.0):
            _, found = saved_by(stager, {key: torch.ones(3)})
            assert (found == file_of_synchronous_save({key: torch.ones(3)})) is True


def test_values_that_are_pickled_as_long_are_exchanged_again_and_again() -> None:
    state = base_state()
    with synchronous() as stager:
        numbers = set()
        for step in range(2, 9):
            state["step"], state["rate"] = step, 1 / step
            state["module"]._metadata[""]["version"] = step
            number, found = saved_by(stager, state)
            numbers.add(number)
            assert (found == file_of_synchronous_save(state)) is True
        assert len(numbers) == 1
        state["step"] = 1000
        number, found = saved_by(stager, state)
        assert number not in numbers
        assert (found == file_of_synchronous_save(state)) is True


# Very many tensors


def test_more_tensors_than_are_compared_at_once_are_compared_later() -> None:
    state = {f"tensor {number}": torch.full((2,), float(number)) for number in range(AT_ONCE + 1)}
    planner = Planner()
    planner.take(state)
    taken = planner.take(state)
    assert taken.unchecked is not None
    assert planner.holds(taken)
    with synchronous() as stager:
        first, _ = saved_by(stager, state)
        second, found = saved_by(stager, state)
        assert second == first
        assert (found == file_of_synchronous_save(state)) is True
        state["tensor 9999"] = torch.ones(2, dtype=torch.int32)
        third, found = saved_by(stager, state)
        assert third != first
        assert (found == file_of_synchronous_save(state)) is True


def bytes_read_at_once(taken: Taken) -> list[tuple[int, int]]:
    """Where the bytes of each storage are read, from and to."""
    sizes = taken.plan.sizes
    return [(start, start + size) for start, size in zip(taken.addresses, sizes, strict=True) if size]


FREED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "nothing": lambda state: None,
    "views made tensors of their own": lambda state: state.update({key: state[key].clone() for key in state}),
    "one view made a tensor of its own": lambda state: state.update(small=state["small"].clone()),
    "a storage freed": lambda state: state["own"].untyped_storage().resize_(0),
    "a storage freed under a view": lambda state: state["view"].untyped_storage().resize_(0),
}


@pytest.mark.parametrize("change", FREED)
def test_memory_that_is_not_there_is_not_read_before_the_comparison(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(plan_module, "_CHECKED_AT_ONCE", LATER)
    flat = torch.zeros(ELEMENTS)
    state = {"small": flat[:4], "rest": flat[4:], "own": torch.ones(10), "view": torch.ones(20)[5:]}
    planner = Planner()
    planner.take(state)
    FREED[change](state)
    try:
        taken = planner.take(state)
    except UnsupportedStateError:
        assert "freed" in change
        return
    storages = [tensor.untyped_storage() for tensor in state.values()]
    for start, end in bytes_read_at_once(taken):
        assert any(s.data_ptr() <= start and end <= s.data_ptr() + s.nbytes() for s in storages)


def save_while_tensors_let_go_of_their_memory(checked: int) -> list[bool]:
    """Whether each of several saves is right, or was found torn."""
    plan_module._CHECKED_AT_ONCE = checked
    outcomes = []
    with gate_before_copies() as gate, DefaultStager() as stager:
        state = {"weights": torch.ones(16 << 20), "others": torch.ones(16 << 20)}
        for _ in range(3):
            expected = {name: tensor.clone() for name, tensor in state.items()}
            gate.shut()
            future = stager.stage(state)
            gate.wait_until_reached()
            for tensor in state.values():
                tensor.data = tensor.data[:ELEMENTS] * 2  # as small as not to be given the same memory
            gc.collect()
            gate.open()
            assert isinstance(future, Future)
            error = future.exception(PATIENCE_SECS)
            if error is None:
                outcomes.append(all(torch.equal(future.result()[name], expected[name]) for name in state))
            else:
                outcomes.append(isinstance(error, TornSnapshotError))
            for tensor in state.values():
                tensor.data = torch.full((16 << 20,), 3.0)
    return outcomes


@pytest.mark.parametrize("checked", [AT_ONCE, LATER])
def test_hazard_11_a_tensor_given_other_memory_meanwhile_is_saved_or_found_torn(checked: int) -> None:
    worker = Worker()  # it might not survive
    try:
        assert worker.call(save_while_tensors_let_go_of_their_memory, checked) == [True, True, True]
    finally:
        worker.kill()


def test_hazard_11_a_state_found_late_to_have_other_types_is_given_up_and_never_taken_as_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "_CHECKED_AT_ONCE", LATER)
    before_preparing = Gate()
    real = StagingJob.prepare

    def prepare(self: StagingJob, planner: Planner, **options: Any) -> int:
        before_preparing.pass_by()
        return real(self, planner, **options)

    monkeypatch.setattr(StagingJob, "prepare", prepare)
    state: dict[str, Any] = {"a": torch.ones(8), "small": torch.ones(8), "list": [1], "step": 1}
    with DefaultStager() as stager:
        stager.stage(state).result(PATIENCE_SECS)  # type: ignore[union-attr]
        state["a"] = torch.ones(8, dtype=torch.int32)
        before_preparing.shut()
        future = stager.stage(state)
        before_preparing.wait_until_reached()
        state["step"] = 2
        state["list"].append(2)
        state["small"].data.fill_(5)
        before_preparing.open()
        assert isinstance(future, Future)
        error = future.exception(PATIENCE_SECS)
        assert type(error) is StagingError
        assert "the next save goes through" in str(error)
        assert_equal(stager.stage(state).result(PATIENCE_SECS), state)  # type: ignore[union-attr]
