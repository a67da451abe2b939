"""Whether two states differ in nothing but tensors' data and plain values."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lastgood._staging.structure import Structure, plain_bytes, structure_of
from lastgood.capture import capture


def structure(state: Any) -> Structure | None:
    found = structure_of(state, capture(state).index.root)
    return None if found is None else found[0]


def with_attributes(**attributes: Any) -> OrderedDict[str, Any]:
    made: OrderedDict[str, Any] = OrderedDict(a=1)
    vars(made).update(attributes)
    return made


TENSOR = torch.ones(3)
LIST = [1]
TUPLE = (LIST,)
SAME = [
    ({"a": 1, "b": [None, 2.5, "x"]}, {"a": -(2**80), "b": [None, float("nan"), "\ud800"]}),
    ({"a": TENSOR, "b": TENSOR}, {"a": torch.zeros(7), "b": TENSOR}),
    ([(), [], {}], [(), [], {}]),
    ({1: 1, None: 2, b"x": 3}, {1: 4, None: 5, b"x": 6}),
    (with_attributes(_metadata={"version": 1}), with_attributes(_metadata={"version": 2})),
    ((1, (2, [3])), (4, (5, [6]))),
    ({"s": torch.Size([1]), "d": torch.int8}, {"s": torch.Size([2]), "d": torch.int16}),  # compared as leaves
]
DIFFERENT = [
    ({"a": 1}, {"a": True}),
    ({"a": 1}, {"a": 1.0}),
    ({"a": None}, {"a": 0}),
    ({1: 1}, {True: 1}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"a": 1}, OrderedDict(a=1)),
    ({"a": 1}, {"a": 1, "b": 1}),
    ([1], [1, 1]),
    ([1], (1,)),
    ({"a": TENSOR}, {"a": torch.nn.Parameter(TENSOR)}),
    ({"a": TENSOR}, {"a": None}),
    (with_attributes(x=1), with_attributes()),
    (with_attributes(), with_attributes(x=1)),
    (with_attributes(x=1), with_attributes(y=1)),
    ({"a": [1], "b": [1]}, {"a": LIST, "b": LIST}),
    ({"a": ([1],), "b": ([1],)}, {"a": TUPLE, "b": TUPLE}),
    ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}]}),
]
NOT_WORTH_IT: list[Any] = [
    {"a": LIST, "b": LIST},
    {"a": {1, 2}},
    {"a": bytearray(b"x")},
    {"a": 1j},
    {"a": torch.empty(3).to_sparse()},
    {0.0: 1},
    {(1, 2): 1},
    TENSOR,
    1,
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_states_that_differ_in_data_and_plain_values_match_both_ways(first: Any, second: Any) -> None:
    for known, other in ((first, second), (second, first)):
        known_structure = structure(known)
        assert known_structure is not None
        assert known_structure.match(other) is not None


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_states_that_differ_in_anything_else_do_not_match(first: Any, second: Any) -> None:
    for known, other in ((first, second), (second, first)):
        known_structure = structure(known)
        if known_structure is not None:  # what stands twice is never matched
            assert known_structure.match(known) is not None
            assert known_structure.match(other) is None


@pytest.mark.parametrize("state", NOT_WORTH_IT)
def test_what_is_not_worth_matching_has_no_structure(state: Any) -> None:
    assert structure(state) is None


def test_the_walk_finds_each_leaf_in_the_order_of_the_nodes() -> None:
    other = torch.zeros(2)
    state = {"a": 1, "inner": [TENSOR, {"b": 2.5, "c": other}], "d": TENSOR, "e": "x", "f": torch.Size([1])}
    known = structure(state)
    assert known is not None
    leaves = known.match(state)
    assert leaves is not None
    assert [id(tensor) for tensor in leaves.tensors] == [id(TENSOR), id(TENSOR), id(other)]
    assert leaves.plain == [1, "x", 2.5]
    assert leaves.fixed == [torch.Size([1])]
    storages = [node.storage for node in known.tensor_nodes]
    assert storages == [0, 0, 1]


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())


def exactly(value: Any) -> Any:
    return type(value), value.hex() if type(value) is float and value == value else repr(value)


@given(first=st.lists(PLAIN, max_size=4), second=st.lists(PLAIN, max_size=4))
def test_plain_values_have_the_same_bytes_only_if_they_are_the_same(first: list[Any], second: list[Any]) -> None:
    if list(map(exactly, first)) != list(map(exactly, second)):
        assert plain_bytes(first) != plain_bytes(second)
    assert plain_bytes([0.0]) != plain_bytes([-0.0])
    assert plain_bytes([1]) != plain_bytes([True]) != plain_bytes([1.0])
