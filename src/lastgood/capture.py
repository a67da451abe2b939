"""From a state dict to its description: the index, the pickle, and the memory that the tensors stand in.

Structure and plain Python values are copied at once: changing them afterwards changes nothing here. Tensor data is
not copied; the extents refer to the tensors' own memory.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from lastgood._memory import paused_garbage_collection
from lastgood._opaque import OpaquePickler, type_name
from lastgood._storage_uses import StorageUse, StorageUses, UnsavableStorageError
from lastgood.errors import UnsupportedStateError
from lastgood.format.index import Index, StorageEntry
from lastgood.format.index_head import UNSAVED, IndexHead
from lastgood.format.mesh import Mesh
from lastgood.format.nodes import (
    BytearrayNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    SizeNode,
    TensorNode,
    TupleNode,
    element_span,
    encode_node,
    join_path,
    list_position,
    scalar_node,
)
from lastgood.format.pickle_writer import place_opaque_values
from lastgood.format.spec import DTYPES, MAX_INDEX_DEPTH
from lastgood.format.stream import FileImage, make_image, native_byteorder
from lastgood.sharding.dtensors import is_dtensor
from lastgood.sharding.local_shards import LocalShards, replicas_by_name, sources_of

_DTYPES: dict[torch.dtype, tuple[str, int, bool]] = {
    getattr(torch, name): (name, info.itemsize, name.startswith("complex"))
    for name, info in DTYPES.items()
    if hasattr(torch, name)
}
"""For each dtype that the index knows: its name, bytes an element, and whether it can carry a conjugate bit."""

_NAMED_TENSORS = hasattr(torch.Tensor, "has_names")
"""Whether this torch has named tensors, whose names no file keeps."""

_SCALARS = frozenset({type(None), bool, int, float, str, bytes, bytearray, complex})
_MAX_REPEATS = 1_000_000
"""How often tuples of tuples may be described again."""


@dataclass(frozen=True)
class CapturedState:
    """A state dict as described: ready to become a file image under any save id."""

    index: Index
    pickle_bytes: bytes
    extents: Sequence[StorageUse]

    tensors: Sequence[tuple[torch.Tensor, TensorNode]]
    """The tensors that the index describes, each once."""

    has_opaque_values: bool

    replicas: Sequence[tuple[str, torch.Tensor]] = ()
    """The tensors that were declared to be the same on all ranks, whole, by their names and in the order of these."""

    sources: Sequence[tuple[str, torch.Tensor]] = ()
    """The DTensors that tensors of the index are parts of, with their names."""

    def image(self, head: IndexHead) -> FileImage:
        """The file image of this state for one save."""
        index = msgspec.structs.replace(self.index, **msgspec.structs.asdict(head))
        with paused_garbage_collection():
            return make_image(index, self.pickle_bytes, self.extents)


def capture(state: Any) -> CapturedState:
    """Describe ``state``, anything that ``torch.save`` takes.

    Raises :class:`~lastgood.errors.UnsupportedStateError` naming the key path of a value that cannot be saved.
    Warns, naming the key path, of a value that a safe load will refuse.
    """
    with paused_garbage_collection():
        return _capture(state)


def _capture(state: Any) -> CapturedState:
    walker = _Walker()
    root = walker.describe(state, "", 0)
    uses = walker.uses
    uses.settle()
    starts = [use.start for use in uses]
    for _, node in walker.tensors:
        # Offsets count from the first used byte of the storage; an empty tensor uses none.
        if node.offset:
            node.offset = (
                node.offset - starts[node.storage] // DTYPES[node.dtype].itemsize if 0 not in node.shape else 0
            )
    bodies = walker.opaque_bodies()
    index = _make_index(root, [use.entry() for use in uses], list(walker.meshes))
    pickle_bytes = place_opaque_values(index, bodies, [node for node, _, _ in walker.opaque])
    index.pickle_size = len(pickle_bytes)
    replicas, sources = replicas_by_name(walker.shards), sources_of(walker.shards)
    return CapturedState(index, pickle_bytes, list(uses), walker.tensors, bool(walker.opaque), replicas, sources)


def _make_index(root: Node, storages: list[StorageEntry], meshes: list[Mesh]) -> Index:
    """An index that belongs to no save yet."""
    return Index(
        **msgspec.structs.asdict(UNSAVED),
        byteorder=native_byteorder(),
        pickle_size=0,
        storages=storages,
        meshes=meshes,
        root=root,
    )


@dataclass(frozen=True)
class DescribedValue:
    """A value in memory under the same description as one in a file."""

    index: Index
    storages: list[torch.UntypedStorage]
    opaque_values: dict[int, Any]

    def opaque(self, node: OpaqueNode) -> Any:
        """The value of an opaque node of the index."""
        return self.opaque_values[id(node)]


def describe_loaded(value: Any) -> DescribedValue:
    """Describe a value so that parts of it can be picked; its storages are whole, and nothing is pickled."""
    walker = _Walker(pickling=False)
    root = walker.describe(value, "", 0)
    index = _make_index(root, [use.entry() for use in walker.uses], [])
    opaque = {id(node): opaque_value for node, opaque_value, _ in walker.opaque}
    return DescribedValue(index, [use.storage for use in walker.uses], opaque)


class _Walker:
    """Walks a state dict once, describing what it meets; every object met stays alive through the state itself."""

    def __init__(self, *, pickling: bool = True) -> None:
        self.uses = StorageUses()
        self.tensors: list[tuple[torch.Tensor, TensorNode]] = []
        self.meshes: dict[Mesh, int] = {}
        self._mesh_numbers: dict[int, int] = {}
        self.shards: list[LocalShards] = []
        self._numbers: dict[int, int] = {}
        self._tuples: set[int] = set()
        self._repeats = 0
        self.opaque: list[tuple[OpaqueNode, Any, str]] = []
        self._pickling = pickling
        self._pickler = OpaquePickler(self.uses)

    def describe(self, value: Any, path: str, depth: int) -> Node:
        """The node of ``value``, which stands at ``path`` inside ``depth`` containers."""
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return self._describe_tensor(value, path)
        if kind in _SCALARS and kind is not bytearray:
            return scalar_node(value)
        if kind is LocalShards:
            return self._describe_shards(value, path)
        number = self._numbers.get(id(value))
        if number is not None:
            return ReferenceNode(number)
        if depth >= MAX_INDEX_DEPTH:
            return self.describe_opaque(value, path)
        if kind is dict or kind is OrderedDict or kind is list or kind is tuple or kind is set or kind is bytearray:
            return self._describe_container(value, path, depth)
        if kind is torch.Size:
            return SizeNode(tuple(value))
        if kind is torch.dtype and value in _DTYPES:
            return DtypeNode(_DTYPES[value][0])
        if kind is torch.device:
            return DeviceNode(value.type, value.index)
        return self.describe_opaque(value, path)

    def _describe_shards(self, value: LocalShards, path: str) -> Node:
        description = value.description
        dtype = _DTYPES.get(description.dtype)
        if dtype is None:
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is spread over ranks and has dtype {description.dtype}, which only a "
                "pickle describes; nothing was written. Gather it before saving.",
                tensor=path,
            )
        self.shards.append(value)
        return ShardedNode(
            mesh=self._mesh_number(description.mesh),
            placements=description.placements,
            dtype=dtype[0],
            shape=description.shape,
            flags=description.flags,
            offsets=[piece.box.offsets for piece in description.pieces],
            items=[self._describe_tensor(part, path) for part in value.tensors],
        )

    def _mesh_number(self, mesh: Mesh) -> int:
        known = self._mesh_numbers.get(id(mesh))
        if known is None:  # hashing one looks at every rank in it
            known = self._mesh_numbers[id(mesh)] = self.meshes.setdefault(mesh, len(self.meshes))
        return known

    def _describe_container(self, value: Any, path: str, depth: int) -> Node:
        kind = type(value)
        if kind is set:
            try:
                set_node = SetNode(sorted((_item_node(item, depth + 1) for item in value), key=encode_node))
            except TypeError:
                return self.describe_opaque(value, path)
            self._numbers[id(value)] = len(self._numbers)
            return set_node
        if kind is tuple:
            self._note_tuple(value, path)
        else:
            self._numbers[id(value)] = len(self._numbers)
        if kind is bytearray:
            return BytearrayNode(bytes(value))
        if kind is dict:
            return self._describe_dict(value, path, depth)
        if kind is OrderedDict:
            pairs = self._pairs(value, path, depth)
            attributes = {
                name: self.describe(item, join_path(path, name), depth + 1) for name, item in vars(value).items()
            }
            return OrderedDictNode(pairs, attributes)
        items = [
            self.describe(item, join_path(path, list_position(number)), depth + 1) for number, item in enumerate(value)
        ]
        return ListNode(items) if kind is list else TupleNode(items)

    def _note_tuple(self, value: tuple[Any, ...], path: str) -> None:
        # Tuples are described wherever they stand, as nobody can tell two equal ones apart. Where each holds the one
        # before twice, that would double at every level.
        if id(value) not in self._tuples:
            self._tuples.add(id(value))
        elif any(type(item) is tuple for item in value):
            self._repeats += 1
            if self._repeats > _MAX_REPEATS:
                raise UnsupportedStateError(
                    f"the value at key {path!r} stands inside tuples that hold the same tuples over and over, more "
                    f"than {_MAX_REPEATS} times in all; nothing was written. Use lists for what is shared.",
                    tensor=path,
                )

    def _describe_dict(self, value: dict[Any, Any], path: str, depth: int) -> Node:
        if not all(type(key) is str and key.isascii() for key in value):
            return MapNode(self._pairs(value, path, depth))
        items: dict[str, Node] = {}
        for key, item in value.items():
            if type(item) is torch.Tensor:
                items[key] = self._describe_tensor(item, path, key)
            else:
                items[key] = self.describe(item, join_path(path, key), depth + 1)
        return DictNode(items)

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[tuple[Node, Node]]:
        pairs = []
        for key, item in value.items():
            place = join_path(path, key)
            pairs.append((self.describe(key, place, depth + 1), self.describe(item, place, depth + 1)))
        return pairs

    def _describe_tensor(self, tensor: torch.Tensor, path: str, key: Any = None) -> Node:
        """The node of the tensor under ``key`` of ``path``. Runs once a tensor: every attribute asked for costs."""
        identity = id(tensor)
        number = self._numbers.get(identity)
        if number is not None:
            return ReferenceNode(number)
        dtype = _DTYPES.get(tensor.dtype)
        plain = _plain_storage(tensor) if dtype is not None and not tensor.__dict__ else None
        if _NAMED_TENSORS and any(getattr(tensor, "names", ())):  # torch's own pickling refuses them, and says why
            plain = None
        if dtype is None or plain is None:
            return self.describe_opaque(tensor, join_path(path, key) if key is not None else path)
        storage, stride = plain
        shape, offset = tuple(tensor.shape), int(tensor.storage_offset())
        span = tensor.numel() if tensor.is_contiguous() else element_span(shape, stride)
        name, itemsize, is_complex = dtype
        try:
            use = self.uses.add_span(storage, name, itemsize, offset, span)
        except UnsavableStorageError as error:
            place = join_path(path, key) if key is not None else path
            if not self._pickling:
                return self.describe_opaque(tensor, place)
            raise UnsupportedStateError(f"the tensor at key {place!r} {error}", tensor=place) from None
        self._numbers[identity] = len(self._numbers)
        flags = "p" if type(tensor) is torch.nn.Parameter else ""
        if tensor.requires_grad:
            flags += "g"
        if is_complex and tensor.is_conj():
            flags += "c"
        if tensor.is_neg():
            flags += "n"
        node = TensorNode(use.number, name, offset, shape, stride, flags)
        self.tensors.append((tensor, node))
        return node

    def describe_opaque(self, value: Any, path: str) -> Node:
        """A value that goes into the pickle as Python's own pickler writes it."""
        if self._pickling and is_dtensor(value):
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is a DTensor, of which this rank has a part; nothing was written. Save it "
                "by a checkpointer that is made on all ranks of its mesh and has lastgood's own writer, or gather it "
                "first (tensor.full_tensor()).",
                tensor=path,
            )
        node = OpaqueNode(0, 0, 0, (), type_name(value))
        if self._pickling:
            self._pickler.rehearse(value, path)
        self.opaque.append((node, value, path))
        return node

    def opaque_bodies(self) -> bytes:
        """The pickles of all opaque values end to end, now that all storages are known; fills in their nodes."""
        bodies = []
        for node, value, path in self.opaque:
            body, node.memo_size, node.storages = self._pickler.pickle(value, path)
            node.length = len(body)
            bodies.append(body)
        return b"".join(bodies)


def _item_node(item: Any, depth: int) -> Node:
    """The node of a set's item; ``TypeError`` for what is neither a scalar nor a tuple of such."""
    if type(item) is not tuple:
        return scalar_node(item)
    if depth >= MAX_INDEX_DEPTH:
        raise TypeError("nested too deep")
    return TupleNode([_item_node(part, depth + 1) for part in item])


def _plain_storage(tensor: torch.Tensor) -> tuple[torch.UntypedStorage, tuple[int, ...]] | None:
    """Storage and strides; ``None`` for sparse, nested and other tensors that are more than a view of one storage."""
    try:
        return tensor.untyped_storage(), tensor.stride()
    except (RuntimeError, NotImplementedError):
        return None
