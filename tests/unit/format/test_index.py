"""The index: what is written reads back the same, and what no writer can have written is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.capture.states import states

from lastgood.capture import CapturedState, capture
from lastgood.errors import UnsupportedStateError
from lastgood.format.index import InvalidIndexError, decode_index, encode_index
from lastgood.format.nodes import (
    ComplexNode,
    FloatNode,
    IntNode,
    TextNode,
    join_path,
    keyed_children,
    list_position,
    scalar_node,
    walk_nodes,
    walk_paths,
)
from lastgood.format.spec import DTYPES, MAX_INDEX_DEPTH

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning"),
]


def captured(state: Any) -> CapturedState | None:
    """The state as described; ``None`` for one of those that cannot be saved."""
    try:
        return capture(state)
    except UnsupportedStateError:
        return None


@settings(max_examples=100)
@given(state=states())
def test_an_index_reads_back_as_it_was_written(state: Any) -> None:
    known = captured(state)
    if known is None:
        return
    encoded = encode_index(known.index)
    decoded = decode_index(encoded)
    assert decoded == known.index
    assert encode_index(decoded) == encoded
    json.loads(encoded)  # any reader of JSON can read it


@given(st.integers() | st.integers(-(2**66), 2**66))
def test_integers_of_any_size_have_a_node(value: int) -> None:
    node = scalar_node(value)
    if isinstance(node, IntNode):
        assert int.from_bytes(node.value, "little", signed=True) == value
        assert not -(2**63) <= value < 2**63
    else:
        assert node == value


@pytest.mark.parametrize("value", [[], {}, (), object(), True.real.__class__(1).real.__class__, torch.ones(1)])
def test_what_is_no_scalar_has_no_scalar_node(value: Any) -> None:
    with pytest.raises(TypeError, match="is not a plain scalar"):
        scalar_node(value)


def test_values_that_json_cannot_hold_have_nodes_of_their_own() -> None:
    kinds = {float("inf"): FloatNode, 1j: ComplexNode, "\ud800": TextNode, 2**63: IntNode}
    for value, kind in kinds.items():
        assert type(scalar_node(value)) is kind


def test_storages_stand_in_the_index_as_the_format_says() -> None:
    memory = torch.arange(8, dtype=torch.uint8)
    known = capture([torch.ones(2), memory, memory.view(torch.int16)])
    assert json.loads(encode_index(known.index))["storages"] == [[8, "float32", "cpu"], [8, "untyped", "cpu"]]


# What is refused


def valid() -> dict[str, Any]:
    """A valid index as plain JSON: one tensor, under its root's key "w"."""
    known = capture({"w": torch.arange(6.0).reshape(2, 3), "x": [1, 2.5, "three"]})
    document: dict[str, Any] = json.loads(encode_index(known.index))
    return document


def refused(document: Any) -> str:
    """The error's words for a document that must not be read."""
    with pytest.raises(InvalidIndexError) as caught:
        decode_index(document if isinstance(document, bytes) else json.dumps(document).encode())
    return str(caught.value)


def tensor(**changes: Any) -> dict[str, Any]:
    """A valid index but for these fields of its tensor."""
    document = valid()
    names = ["kind", "storage", "dtype", "offset", "shape", "stride", "flags"]
    node = document["root"][1]["w"]
    assert dict(zip(names, node, strict=True))["shape"] == [2, 3]
    for name, value in changes.items():
        node[names.index(name)] = value
    return document


def with_root(root: Any) -> dict[str, Any]:
    return valid() | {"root": root}


def nested(depth: int) -> list[Any]:
    root: Any = 1
    for _ in range(depth):
        root = ["list", [root]]
    return root


def test_the_documents_that_these_tests_change_are_valid() -> None:
    decode_index(json.dumps(valid()).encode())
    decode_index(json.dumps(tensor(shape=[3, 2], stride=[1, 3])).encode())
    decode_index(json.dumps(with_root(nested(MAX_INDEX_DEPTH))).encode())
    decode_index(json.dumps(with_root(["list", [["list", []], ["reference", 1]]])).encode())
    decode_index(json.dumps(with_root(["list", [["tuple", [["reference", 0]]]]])).encode())
    decode_index(json.dumps(with_root(["opaque", 0, 10, 2, [0], "some.Type"])).encode())


@pytest.mark.parametrize("version", [0, 2, 10**30, "1", None])
def test_another_format_version_is_refused(version: Any) -> None:
    assert "version" in refused(valid() | {"format_version": version})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"storage": 1}, "storage 1 of 1"),
        ({"storage": -1}, ">= 0"),
        ({"dtype": "float33"}, "unknown dtype 'float33'"),
        ({"dtype": "int32"}, "int32 tensor on a float32 storage"),
        ({"offset": 1}, "beyond its storage of 24 bytes"),
        ({"offset": 2**62}, "beyond its storage"),
        ({"offset": -1}, ">= 0"),
        ({"offset": 1.5}, "int"),
        ({"shape": [2, 4]}, "beyond its storage"),
        ({"shape": [2**62, 2**62]}, "more than 2**63 elements"),
        ({"shape": [2, -3]}, ">= 0"),
        ({"shape": [2]}, "shape"),
        ({"shape": "23"}, "array"),
        ({"stride": [6, 1]}, "beyond its storage"),
        ({"stride": [3, -1]}, ">= 0"),
        ({"stride": [3, 1, 1]}, "stride"),
        ({"flags": 3}, "str"),
    ],
    ids=str,
)
def test_a_tensor_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refused(tensor(**changes))


@pytest.mark.parametrize(
    "root",
    [
        ["reference", 0],
        ["list", [["reference", 1]]],
        ["list", [["reference", 1], ["list", []]]],
        ["tuple", [["reference", 0]]],
        ["map", [[["reference", 1], 1]]],
        ["list", [["reference", 2**62]]],
    ],
    ids=str,
)
def test_a_reference_to_what_comes_later_or_never_is_refused(root: Any) -> None:
    assert "before it was described" in refused(with_root(root))


@pytest.mark.parametrize("kind", ["list", "tuple", "set", "dict", "map"])
def test_what_is_nested_too_deep_is_refused(kind: str) -> None:
    root: Any = 1
    wrap: Callable[[Any], Any] = {"dict": lambda inner: {"k": inner}, "map": lambda inner: [[1, inner]]}.get(
        kind, lambda inner: [inner]
    )
    for _ in range(MAX_INDEX_DEPTH + 1):
        root = [kind, wrap(root)]
    assert "deep" in refused(with_root(root))


def test_what_is_nested_a_million_deep_is_refused() -> None:
    document = json.dumps(with_root("HERE"))
    refused(document.replace('"HERE"', '["list",[' * 1_000_000 + "]]" * 1_000_000).encode())


@pytest.mark.parametrize(
    "root",
    [
        ["opaque", 0, 10**9, 0, [], "x"],
        ["opaque", 10**9, 1, 0, [], "x"],
        ["opaque", 0, 10, 11, [], "x"],
        ["opaque", 0, 10, 0, [1], "x"],
        ["opaque", 0, 10, 0, [-1], "x"],
        ["opaque", -1, 10, 0, [0], "x"],
        ["float", "AAAA"],
        ["complex", "AAAAAAAAAAA="],
        ["float", "not base64!"],
        ["dtype", 7],
        ["device", "cpu", "0"],
        ["unknown", 1],
        ["list"],
        ["list", [1], 2],
        ["list", {"a": 1}],
        ["dict", [1]],
        ["map", [[1]]],
        ["map", [[1, 2, 3]]],
        ["size", [1.5]],
        [],
        {"a": 1},
    ],
    ids=str,
)
def test_a_node_that_no_writer_writes_is_refused(root: Any) -> None:
    refused(with_root(root))


def test_a_storage_that_cannot_hold_whole_elements_is_refused() -> None:
    assert "whole float32 elements" in refused(valid() | {"storages": [[25, "float32", "cpu"]]})


@pytest.mark.parametrize(
    "changes",
    [
        {"storages": [[-4, "float32", "cpu"]]},
        {"storages": [["24", "float32", "cpu"]]},
        {"storages": [[24, "float32"]]},
        {"storages": [[24, "float32", "cpu", 1]]},
        {"storages": [[24, None, "cpu"]]},
        {"storages": {}},
        {"rank": -1},
        {"world_size": "2"},
        {"step": "3"},
        {"independent": 1},
        {"pickle_size": -1},
        {"save_id": 5},
        {"extra": 1},
    ],
    ids=str,
)
def test_an_index_with_wrong_members_is_refused(changes: dict[str, Any]) -> None:
    refused(valid() | changes)


@pytest.mark.parametrize("name", sorted(valid()))
def test_an_index_without_one_of_its_members_is_refused(name: str) -> None:
    document = valid()
    del document[name]
    assert name in refused(document)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"format_version":1}', b"\x80\x02N.", b'{"root":"\xed\xa0\x80"}']
)
def test_what_is_no_index_is_refused(data: bytes) -> None:
    refused(data)


def test_a_truncated_index_is_refused_wherever_it_ends() -> None:
    encoded = json.dumps(valid()).encode()
    for end in range(len(encoded)):
        refused(encoded[:end])


# Walking


def test_nodes_come_a_container_before_what_it_holds() -> None:
    root = decode_index(json.dumps(with_root(["list", [1, ["dict", {"a": 2}], ["tuple", [3]]]])).encode()).root
    assert [(node if isinstance(node, int) else type(node).__name__, depth) for node, depth in walk_nodes(root)] == [
        ("ListNode", 0),
        (1, 1),
        ("DictNode", 1),
        (2, 2),
        ("TupleNode", 1),
        (3, 2),
    ]


def test_key_paths_read_as_python_would_reach_the_values() -> None:
    state = {"model": {"layers.0": [1, (2,)], 3: {"x": 4}}, "set": {5}}
    paths = [path for path, _ in walk_paths(capture(state).index.root)]
    assert paths == [
        "",
        "model",
        "model.layers.0",
        "model.layers.0[0]",
        "model.layers.0[1]",
        "model.layers.0[1][0]",
        "model.3",
        "model.3.x",
        "set",
        "set[0]",
    ]
    assert join_path("", list_position(2)) == "[2]"
    assert join_path("a", 10**5000) == "a.<int>"
    assert list(keyed_children(1)) == []


def test_every_dtype_has_the_element_size_that_torch_gives_it() -> None:
    known = {name: getattr(torch, name).itemsize for name in DTYPES if hasattr(torch, name)}
    assert known == {name: DTYPES[name].itemsize for name in known}
    assert len(known) >= 20
