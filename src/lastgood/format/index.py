"""The index: what a checkpoint file holds, as typed data that can be read without running anything.

Its root is a node (:mod:`lastgood.format.nodes`); what no writer can have written is refused here.
"""

import itertools

import msgspec

from lastgood.format.mesh import Box, Count, Layout, Mesh, check_mesh, element_count, parse_placement, whole
from lastgood.format.nodes import (
    NUMBERED,
    ComplexNode,
    FloatNode,
    Node,
    OpaqueNode,
    ReferenceNode,
    ShardedNode,
    TensorNode,
    element_span,
    walk_nodes,
)
from lastgood.format.spec import DTYPES, FORMAT_VERSION, MAX_INDEX_DEPTH, UNTYPED

_MOST_PARTS = 512
"""Of one tensor in one file: replicas' shares and strided shards are a few boxes each."""

_FLAGS = frozenset("".join(letters) for count in range(5) for letters in itertools.combinations("pgcn", count))
_FLOAT_SIZES: dict[type, int] = {FloatNode: 8, ComplexNode: 16}


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
_decoder = msgspec.json.Decoder(Index)


def encode_index(index: Index) -> bytes:
    """The canonical JSON of an index: no spaces, members in the order of the class."""
    return _encoder.encode(index)


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
    try:
        element_count(node.shape)
    except ValueError as error:
        raise InvalidIndexError(str(error)) from error
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
