"""The index: what a checkpoint file holds, as typed data that can be read without running anything.

A value of the state dict is described by a *node*. ``None``, ``bool``, ``int``, finite ``float`` and ``str`` stand
for themselves in JSON; everything else is an array whose first item names the kind. docs/format.md lists them.
"""

import functools
import itertools
import math
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

from lastgood.format.sharding import Box, Count, Layout, Mesh, check_mesh, parse_placement, whole
from lastgood.format.spec import DTYPES, FORMAT_VERSION, MAX_INDEX_DEPTH, UNTYPED


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


_MOST_PARTS = 512
"""Of one tensor in one file: replicas' shares and strided shards are a few boxes each."""

_FLAGS = frozenset("".join(letters) for count in range(5) for letters in itertools.combinations("pgcn", count))
_FLOAT_SIZES: dict[type, int] = {FloatNode: 8, ComplexNode: 16}


CONTAINERS = (DictNode, MapNode, OrderedDictNode, ListNode, TupleNode, ShardedNode, SetNode)


class StorageEntry(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One storage record: its bytes, the dtype of the tensors on it, and the device tag it was saved from."""

    nbytes: Count
    dtype: str
    location: str


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """Everything a file says about itself. ``independent`` marks a rank's file that no manifest will join.

    ``saved_at`` is the time of the save in seconds since 1970 (UTC), ``metrics`` what was measured of the model then;
    ``None`` stands for a number that is not finite. Both are there if whoever saved gave them.
    """

    format_version: int
    save_id: str
    rank: Count
    world_size: Count
    step: int | None
    independent: bool
    saved_at: float | None
    metrics: dict[str, float | None] | None
    byteorder: str
    pickle_size: Count
    storages: list[StorageEntry]
    meshes: list[Mesh]
    root: Node


class InvalidIndexError(ValueError):
    """An index that no writer can have written. Callers turn this into an error with the file's path."""


_encoder = msgspec.json.Encoder()
_node_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Index)


def encode_index(index: Index) -> bytes:
    """The canonical JSON of an index: no spaces, members in the order of the class."""
    return _encoder.encode(index)


def encode_node(node: Node) -> bytes:
    """The canonical JSON of one node."""
    return _node_encoder.encode(node)


def decode_index(data: bytes | memoryview) -> Index:
    """Read and check an index; raises :class:`InvalidIndexError` for anything a writer cannot have written."""
    try:
        index = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidIndexError(str(error)) from error
    if index.format_version != FORMAT_VERSION:
        raise InvalidIndexError(f"format version {index.format_version} in a file of version {FORMAT_VERSION}")
    for entry in index.storages:
        if entry.dtype != UNTYPED and entry.dtype in DTYPES and entry.nbytes % DTYPES[entry.dtype].itemsize:
            raise InvalidIndexError(f"a storage of {entry.nbytes} bytes cannot hold whole {entry.dtype} elements")
    try:
        for mesh in index.meshes:
            check_mesh(mesh)
    except ValueError as error:
        raise InvalidIndexError(str(error)) from error
    _check_nodes(index)
    return index


def _check_nodes(index: Index) -> None:
    numbered = 0
    storages = index.storages
    for node, depth in walk_nodes(index.root):
        if type(node) is TensorNode:
            _check_tensor(node, storages)
            numbered += 1
            continue
        if depth > MAX_INDEX_DEPTH:
            raise InvalidIndexError(f"nested more than {MAX_INDEX_DEPTH} deep")
        if isinstance(node, ReferenceNode) and node.number >= numbered:
            raise InvalidIndexError(f"a reference to object {node.number} before it was described")
        if isinstance(node, ShardedNode):
            _check_sharded(node, index.meshes)
        if isinstance(node, OpaqueNode):
            if not 0 < node.length <= index.pickle_size - node.start or node.memo_size > node.length:
                raise InvalidIndexError("an opaque value outside data.pkl")
            if max(node.storages, default=-1) >= len(index.storages):
                raise InvalidIndexError("an opaque value on a storage that is not there")
        if isinstance(node, (FloatNode, ComplexNode)) and len(node.value) != _FLOAT_SIZES[type(node)]:
            raise InvalidIndexError("a float of the wrong size")
        if isinstance(node, NUMBERED):
            numbered += 1


def _check_tensor(node: TensorNode, storages: list[StorageEntry]) -> None:
    """Raise :class:`InvalidIndexError` unless the tensor lies inside a storage of its own dtype."""
    dtype = DTYPES.get(node.dtype)
    if dtype is None:
        raise InvalidIndexError(f"a tensor of unknown dtype {node.dtype!r}")
    if node.storage >= len(storages):
        raise InvalidIndexError(f"a tensor on storage {node.storage} of {len(storages)}")
    if len(node.shape) != len(node.stride):
        raise InvalidIndexError(f"a tensor of shape {node.shape} with strides {node.stride}")
    if node.flags not in _FLAGS:
        raise InvalidIndexError(f"a tensor with the flags {node.flags!r}")
    entry = storages[node.storage]
    if entry.dtype != node.dtype and entry.dtype != UNTYPED:
        raise InvalidIndexError(f"a {node.dtype} tensor on a {entry.dtype} storage")
    if (node.offset + element_span(node.shape, node.stride)) * dtype.itemsize > entry.nbytes:
        raise InvalidIndexError(f"a tensor that reaches beyond its storage of {entry.nbytes} bytes")


def _check_sharded(node: ShardedNode, meshes: list[Mesh]) -> None:
    """Raise :class:`InvalidIndexError` unless the parts are parts of what the node says."""
    if node.mesh >= len(meshes):
        raise InvalidIndexError(f"a tensor on mesh {node.mesh} of {len(meshes)}")
    try:
        layout_of(node, meshes, "")
    except ValueError as error:
        raise InvalidIndexError(str(error)) from error
    if node.flags not in _FLAGS:
        raise InvalidIndexError(f"a tensor with the flags {node.flags!r}")
    if len(node.offsets) != len(node.items):
        raise InvalidIndexError(f"{len(node.items)} parts of a tensor at {len(node.offsets)} places")
    everything, boxes = whole(node.shape), []
    for offsets, part in zip(node.offsets, node.items, strict=True):
        if not isinstance(part, TensorNode) or part.dtype != node.dtype:
            raise InvalidIndexError(f"a part of a {node.dtype} tensor that is no tensor of this kind")
        box = Box(offsets, part.shape)
        if len(offsets) != len(part.shape) or len(part.shape) != len(node.shape) or box.intersection(everything) != box:
            raise InvalidIndexError(f"a part of shape {part.shape} at {offsets} of a tensor of shape {node.shape}")
        boxes.append(box)
    _refuse_overlap(boxes)


def _refuse_overlap(boxes: list[Box]) -> None:
    """Raise :class:`InvalidIndexError` for parts that share elements: together they could pass for all of a tensor."""
    if len(boxes) > _MOST_PARTS:
        raise InvalidIndexError(f"a tensor in {len(boxes)} parts")
    if any(one.intersection(other) is not None for one, other in itertools.combinations(boxes, 2)):
        raise InvalidIndexError("parts of a tensor that overlap")


def layout_of(node: ShardedNode, meshes: list[Mesh], name: str) -> Layout:
    """How the tensor of this node, which stands under the key path ``name``, is spread; ``ValueError`` if it cannot."""
    dtype = DTYPES.get(node.dtype)
    if dtype is None:
        raise ValueError(f"a tensor of unknown dtype {node.dtype!r}")
    placements = tuple([parse_placement(text) for text in node.placements])
    return Layout(name, dtype.itemsize, node.shape, meshes[node.mesh], placements)


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
    """The values directly inside a container with their keys: strings of a dict, printed keys of a map, positions."""
    if isinstance(node, DictNode):
        yield from node.items.items()
    elif isinstance(node, (MapNode, OrderedDictNode)):
        for key, value in node.items:
            yield (key if isinstance(key, (str, int, float, bool)) else repr(key)), value
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
