"""data.pkl follows from the index alone, byte for byte, and is a pickle by any reader's rules."""

import io
import pickle
import pickletools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.unit.capture.states import states

from lastgood.capture import CapturedState, capture
from lastgood.errors import UnsupportedStateError
from lastgood.format.index import Index, InvalidIndexError, decode_index, encode_index
from lastgood.format.nodes import DtypeNode, ListNode, OpaqueNode, walk_nodes
from lastgood.format.pickle_writer import encode_pickle

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore::lastgood.errors.UnsafeValueWarning"),
]


def opaque_nodes(index: Index) -> list[OpaqueNode]:
    return [node for node, _ in walk_nodes(index.root) if isinstance(node, OpaqueNode)]


def bodies_in(known: CapturedState) -> list[bytes]:
    """The bodies of the opaque values, cut out of the pickle where the index says that they stand."""
    nodes = opaque_nodes(known.index)
    return [known.pickle_bytes[node.start : node.start + node.length] for node in nodes]


@settings(max_examples=100)
@given(state=states())
def test_the_pickle_follows_from_the_index_and_is_well_formed(state: Any) -> None:
    try:
        known = capture(state)
    except UnsupportedStateError:
        return
    index = decode_index(encode_index(known.index))
    assert encode_pickle(index, b"".join(bodies_in(known)), opaque_nodes(index)) == known.pickle_bytes
    assert index.pickle_size == len(known.pickle_bytes)
    listing = io.StringIO()
    # Checks the stack and the memo at every step, and that nothing follows the end.
    pickletools.dis(known.pickle_bytes, out=listing)
    assert "highest protocol among opcodes = 2" in listing.getvalue()


def test_many_distinct_shapes_and_values_do_not_run_out_of_memo_numbers() -> None:
    # More than 256 of everything that the writer remembers, so that both forms of memo numbers appear.
    state = {f"k{number}": torch.empty(1, number)[:, : number // 2] for number in range(600)}
    state |= {f"s{number}": torch.Size([number]) for number in range(600)}  # type: ignore[misc]
    state["again"] = list(state.values())  # type: ignore[assignment]
    known = capture(state)
    pickletools.dis(known.pickle_bytes, out=io.StringIO())
    assert encode_pickle(decode_index(encode_index(known.index)), b"", []) == known.pickle_bytes


def test_more_names_than_the_writer_remembers_are_written_out_each_time() -> None:
    known = capture([1])
    names = [DtypeNode(f"dtype{number}") for number in range(600)]
    known.index.root = ListNode([*names, ListNode(names), ListNode([])])  # type: ignore[list-item]
    encoded = encode_pickle(known.index, b"", [])
    pickletools.dis(encoded, out=io.StringIO())
    found = [argument for opcode, argument, _ in pickletools.genops(encoded) if opcode.name == "GLOBAL"]
    assert len(found) == len(names) + (len(names) - 256)


def test_an_opaque_body_stands_where_the_index_says() -> None:
    known = capture({"first": Counter(a=1), "weight": torch.ones(2), "second": [Counter(b=2), Counter(c=3)]})
    first, second, third = bodies_in(known)
    # The memo goes on from one body to the next, so that only the first one can be read alone.
    assert pickle.loads(b"\x80\x02" + first + b".") == Counter(a=1)
    assert b"X\x01\x00\x00\x00b" in second
    assert b"X\x01\x00\x00\x00c" in third
    assert [node.type_name for node in opaque_nodes(known.index)] == ["collections.Counter"] * 3


def test_bodies_that_are_shorter_than_the_index_says_are_refused() -> None:
    known = capture({"counts": Counter(a=1)})
    with pytest.raises(InvalidIndexError, match="opaque"):
        encode_pickle(known.index, bodies_in(known)[0][:-1], opaque_nodes(known.index))


def test_names_that_would_break_out_of_their_line_are_refused() -> None:
    known = capture([1])
    known.index.root = ListNode([DtypeNode("float32\nos\nsystem")])
    with pytest.raises(InvalidIndexError, match="is no name"):
        encode_pickle(known.index, b"", [])


def test_a_node_without_a_pickle_is_refused() -> None:
    known = capture([1])
    known.index.root = ListNode([object()])  # type: ignore[list-item]
    with pytest.raises(InvalidIndexError, match="no pickle for"):
        encode_pickle(known.index, b"", [])
