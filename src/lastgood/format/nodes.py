"""Nodes: what describes the values of a state dict, as typed data, and how to walk over them.

``None``, ``bool``, ``int``, finite ``float`` and ``str`` stand for themselves in JSON; everything else is an array
whose first item names the kind. docs/format.md lists them.
"""

import functools
import math
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

from lastgood.format.mesh import Box, Count


class _NodeStruct(msgspec.Struct, array_like=True, tag_field="kind", forbid_unknown_fields=True, gc=False):
    pass


class TensorNode(_NodeStruct, tag="tensor"):
    """A strided tensor: a view of a storage, with offset, shape and stride in elements.

    ``flags`` holds letters: ``p`` it is a Parameter, ``g`` requires grad, ``c`` conjugate bit, ``n`` negative bit.
    """

    storage: Count
    dtype: str
    offset: Count
    shape: tuple[Count, ...]
    stride: tuple[Count, ...]
    flags: str


class DictNode(_NodeStruct, tag="dict"):
    """A dict whose keys are all strings, in order."""

    items: "dict[str, Node]"


class MapNode(_NodeStruct, tag="map"):
    """A dict with keys of any kind, as pairs in order."""

    items: "list[tuple[Node, Node]]"


class OrderedDictNode(_NodeStruct, tag="ordered_dict"):
    """An OrderedDict as pairs in order, with its instance attributes (modules keep ``_metadata`` there)."""

    items: "list[tuple[Node, Node]]"
    attributes: "dict[str, Node]"


class ListNode(_NodeStruct, tag="list"):
    """A list."""

    items: "list[Node]"


class TupleNode(_NodeStruct, tag="tuple"):
    """A tuple."""

    items: "list[Node]"


class ShardedNode(_NodeStruct, tag="sharded"):
    """A tensor that is spread over ranks, and the parts of it that are in this file.

    ``mesh`` numbers the index's meshes, ``placements`` are spelt as in :mod:`lastgood.format.sharding`. The part
    ``items[n]`` begins at ``offsets[n]`` of the whole tensor of this ``shape``, in elements. The flags are those of
    :class:`TensorNode`. To whoever reads the pickle it is a tuple of the parts.
    """

    mesh: Count
    placements: tuple[str, ...]
    dtype: str
    shape: tuple[Count, ...]
    flags: str
    offsets: list[tuple[Count, ...]]
    items: "list[Node]"


class SetNode(_NodeStruct, tag="set"):
    """A set; its items are ordered by their encoding, so that equal sets give equal bytes."""

    items: "list[Node]"


class SizeNode(_NodeStruct, tag="size"):
    """A torch.Size, which may hold negative numbers too."""

    items: tuple[int, ...]


class IntNode(_NodeStruct, tag="int"):
    """An int outside the signed 64-bit range: two's complement, least significant byte first, no byte too many."""

    value: bytes


class FloatNode(_NodeStruct, tag="float"):
    """A float that JSON cannot hold (infinite or not a number): the eight bytes of its IEEE 754 form, big-endian."""

    value: bytes


class ComplexNode(_NodeStruct, tag="complex"):
    """A complex number: real and imaginary part, eight bytes each as in :class:`FloatNode`."""

    value: bytes


class TextNode(_NodeStruct, tag="text"):
    """A str with lone surrogates, which JSON cannot hold: UTF-8 with the surrogates passed through."""

    value: bytes


class BytesNode(_NodeStruct, tag="bytes"):
    """A bytes value."""

    value: bytes


class BytearrayNode(_NodeStruct, tag="bytearray"):
    """A bytearray value."""

    value: bytes


class DtypeNode(_NodeStruct, tag="dtype"):
    """A torch.dtype by name, such as ``float32``."""

    name: str


class DeviceNode(_NodeStruct, tag="device"):
    """A torch.device: its type and, where it has one, its number."""

    device_type: str
    index: int | None


class ReferenceNode(_NodeStruct, tag="reference"):
    """The very object described before under this number.

    Tensors, dicts, lists, sets and bytearrays are numbered from 0 in the order in which their descriptions begin.
    """

    number: Count


class OpaqueNode(_NodeStruct, tag="opaque"):
    """A value that only a pickle can describe: ``length`` bytes of data.pkl from ``start`` on.

    ``memo_size`` is how many memo entries these bytes fill, ``storages`` which storages they name; ``type_name`` is
    for people.
    """

    start: Count
    length: Count
    memo_size: Count
    storages: tuple[Count, ...]
    type_name: str


Node: TypeAlias = (
    bool
    | int
    | float
    | str
    | TensorNode
    | DictNode
    | MapNode
    | OrderedDictNode
    | ListNode
    | TupleNode
    | ShardedNode
    | SetNode
    | SizeNode
    | IntNode
    | FloatNode
    | ComplexNode
    | TextNode
    | BytesNode
    | BytearrayNode
    | DtypeNode
    | DeviceNode
    | ReferenceNode
    | OpaqueNode
    | None
)


NUMBERED = (TensorNode, DictNode, MapNode, OrderedDictNode, ListNode, SetNode, BytearrayNode)


CONTAINERS = (DictNode, MapNode, OrderedDictNode, ListNode, TupleNode, ShardedNode, SetNode)


_node_encoder = msgspec.json.Encoder()


def encode_node(node: Node) -> bytes:
    """The canonical JSON of one node."""
    return _node_encoder.encode(node)


@functools.lru_cache(maxsize=4096)
def element_span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one used, both included; 0 for an empty tensor."""
    span = 1
    for size, step in zip(shape, stride, strict=True):
        if size == 0:
            return 0
        span += (size - 1) * step
    return span


def children(node: Node) -> Iterator[Node]:
    """The nodes directly inside a node, in the order in which they are described."""
    if isinstance(node, DictNode):
        yield from node.items.values()
    elif isinstance(node, (MapNode, OrderedDictNode)):
        for key, value in node.items:
            yield key
            yield value
        if isinstance(node, OrderedDictNode):
            yield from node.attributes.values()
    elif isinstance(node, (ListNode, TupleNode, ShardedNode, SetNode)):
        yield from node.items


def walk_nodes(root: Node) -> Iterator[tuple[Node, int]]:
    """All nodes with their depth, a container before what it holds."""
    yield root, 0
    if not isinstance(root, CONTAINERS):
        return
    stack = [children(root)]
    while stack:
        depth = len(stack)
        for node in stack[-1]:
            yield node, depth
            if isinstance(node, CONTAINERS):
                stack.append(children(node))
                break
        else:
            stack.pop()


def walk_paths(root: Node, path: str = "", *, into_shards: bool = True) -> Iterator[tuple[str, Node]]:
    """All values with their dotted key paths, a container before what it holds; keys themselves are left out.

    ``path`` is that of ``root``. Without ``into_shards``, the parts of sharded tensors are left out.
    """
    stack: list[tuple[str, Node]] = [(path, root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if isinstance(node, ShardedNode) and not into_shards:
            continue
        inside = [(join_path(path, key), value) for key, value in keyed_children(node)]
        stack += reversed(inside)


def keyed_children(node: Node) -> Iterator[tuple[Any, Node]]:
    """The values directly inside a container with their keys: strings of a dict, positions; of a map, what is no string
    or number as it stands in the index."""
    if isinstance(node, DictNode):
        yield from node.items.items()
    elif isinstance(node, (MapNode, OrderedDictNode)):
        for key, value in node.items:
            plain = key is None or isinstance(key, (str, int, float))
            yield (key if plain else encode_node(key).decode()), value
    elif isinstance(node, (ListNode, TupleNode, ShardedNode, SetNode)):
        yield from ((list_position(number), value) for number, value in enumerate(node.items))


class _Position(int):
    pass


def list_position(number: int) -> int:
    """A position in a list or tuple, which :func:`join_path` shows in brackets."""
    return _Position(number)


def join_path(path: str, key: Any) -> str:
    """The key path of what stands under ``key`` (or, in a list, at a position) of the container at ``path``."""
    if isinstance(key, _Position):
        return f"{path}[{int(key)}]"
    try:
        shown = str(key)
    except Exception:  # keys may be objects of any kind; Python itself refuses to print an int of 5,000 digits
        shown = f"<{type(key).__name__}>"
    return f"{path}.{shown}" if path else shown


def pack_float(value: float) -> bytes:
    """The eight big-endian bytes that stand for a float in :class:`FloatNode` and :class:`ComplexNode`."""
    return struct.pack(">d", value)


def unpack_floats(data: bytes) -> tuple[Any, ...]:
    """The floats packed by :func:`pack_float`."""
    return struct.unpack(f">{len(data) // 8}d", data)


def _signed_bytes(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def scalar_node(value: Any) -> Node:
    """The node of a plain scalar (None, bool, int, float, complex, str, bytes, bytearray), exact types only.

    Raises ``TypeError`` for anything else.
    """
    kind = type(value)
    node: Node = value
    if value is None or kind is bool:
        return node
    if kind is int:
        return node if -(2**63) <= value < 2**63 else IntNode(_signed_bytes(value))
    if kind is float:
        return node if math.isfinite(value) else FloatNode(pack_float(value))
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return TextNode(value.encode("utf-8", "surrogatepass"))
        return node
    if kind is bytes:
        return BytesNode(value)
    if kind is complex:
        return ComplexNode(pack_float(value.real) + pack_float(value.imag))
    if kind is bytearray:
        return BytearrayNode(bytes(value))
    raise TypeError(f"{kind.__name__} is not a plain scalar")


def walk_leaves(root: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """All values that hold no others, and sharded tensors, with their key paths; ``path`` is that of ``root``."""
    for place, node in walk_paths(root, path, into_shards=False):
        if isinstance(node, ShardedNode) or not isinstance(node, CONTAINERS):
            yield place, node


def walk_values(root: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Like :func:`walk_leaves`, with the lists, tuples and sets: how long they are is a value, too.

    (Which keys a dict has is not: stages of a pipeline have other ones.)
    """
    for place, node in walk_paths(root, path, into_shards=False):
        if not isinstance(node, (DictNode, MapNode, OrderedDictNode)):
            yield place, node


def sharded_nodes(root: Node) -> Iterator[tuple[str, ShardedNode]]:
    """The tensors that are spread over ranks, with their key paths."""
    for path, node in walk_paths(root, into_shards=False):
        if isinstance(node, ShardedNode):
            yield path, node


def first_paths(root: Node) -> dict[int, str]:
    """The key path of the first tensor on each storage; for a part of a spread tensor, that of the tensor."""
    paths: dict[int, str] = {}
    whole: dict[int, str] = {}
    for path, node in walk_paths(root):
        if isinstance(node, ShardedNode):
            whole |= {id(part): path for part in node.items}
        if isinstance(node, TensorNode):
            paths.setdefault(node.storage, whole.get(id(node), path))
    return paths


def parts_of(node: ShardedNode) -> Iterator[tuple[Box, TensorNode]]:
    """The parts of a tensor that one file holds, as boxes of the whole tensor, each with its tensor."""
    for offsets, part in zip(node.offsets, node.items, strict=True):
        if isinstance(part, TensorNode):  # an index with anything else in its place is refused
            yield Box(offsets, part.shape), part
