"""From a state dict to its description: the index, the pickle, and the memory that the tensors stand in.

Structure and plain Python values are copied at once: changing them afterwards changes nothing here. Tensor data is
not copied; the extents refer to the tensors' own memory.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lastgood._memory import address_of, bytes_at, copy_memory
from lastgood._opaque import OpaquePickler, type_name, warn_if_refused
from lastgood._storage_uses import StorageUse, StorageUses
from lastgood.errors import UnsupportedStateError
from lastgood.format.index import (
    BytearrayNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    Index,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    SizeNode,
    StorageEntry,
    TensorNode,
    TupleNode,
    encode_node,
    scalar_node,
)
from lastgood.format.pickle_writer import place_opaque_values
from lastgood.format.spec import DTYPES, FORMAT_VERSION, MAX_INDEX_DEPTH
from lastgood.format.stream import FileImage, make_image, native_byteorder

_DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in DTYPES if hasattr(torch, name)}
_SCALARS = frozenset({type(None), bool, int, float, str, bytes, bytearray, complex})
_NAMED_TENSORS = hasattr(torch.Tensor, "has_names")
_FOREIGN_MEMORY = frozenset({"xla", "maia"})
"""Device types whose storages have no bytes to copy; torch pickles their tensors in its own way."""


@dataclass(frozen=True)
class CapturedState:
    """A state dict as described: ready to become a file image under any save id."""

    index: Index
    pickle_bytes: bytes
    extents: Sequence["StorageExtent"]

    def image(self, *, save_id: str, rank: int, world_size: int, step: int | None, independent: bool) -> FileImage:
        """The file image of this state for one save."""
        self.index.save_id = save_id
        self.index.rank = rank
        self.index.world_size = world_size
        self.index.step = step
        self.index.independent = independent
        return make_image(self.index, self.pickle_bytes, self.extents)


class StorageExtent:
    """The used span of one tensor storage, on whatever device it is."""

    def __init__(self, use: StorageUse) -> None:
        self.nbytes = use.nbytes
        self._start = use.start
        self._storage = use.storage
        self._address = use.storage.data_ptr() + use.start if use.storage.device.type == "cpu" else None

    def copy_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the extent's bytes from ``offset`` on."""
        if self._address is not None:
            copy_memory(address_of(target), self._address + offset, len(target))
            return
        # Not yet run on a device: a blocking copy of just these bytes to the host.
        host = self._device_bytes(offset, len(target))
        copy_memory(address_of(target), host.data_ptr(), len(target))

    def to_bytes(self) -> bytes:
        """A copy of all bytes."""
        if self._address is not None:
            return bytes_at(self._address, self.nbytes)
        host = self._device_bytes(0, self.nbytes)
        return bytes_at(host.data_ptr(), self.nbytes)

    def _device_bytes(self, offset: int, size: int) -> torch.Tensor:
        view = torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)
        return view[self._start + offset : self._start + offset + size].cpu()


def capture(state: Any) -> CapturedState:
    """Describe ``state``, anything that ``torch.save`` takes.

    Raises :class:`~lastgood.errors.UnsupportedStateError` naming the key path of a value that cannot be saved.
    Warns, naming the key path, of a value that a safe load will refuse.
    """
    walker = _Walker()
    try:
        root = walker.describe(state, "", 0)
    except _CycleError:
        walker = _Walker()
        root = walker.describe_opaque(state, "")
    uses = walker.uses
    uses.settle()
    for node, use in walker.tensors:
        # Offsets count from the first used byte of the storage; an empty tensor uses none.
        start = use.start // DTYPES[node.dtype].itemsize
        node.offset = node.offset - start if 0 not in node.shape else 0
    bodies = walker.opaque_bodies()
    index = _make_index(root, [use.entry() for use in uses])
    pickle_bytes = place_opaque_values(index, bodies)
    index.pickle_size = len(pickle_bytes)
    return CapturedState(index, pickle_bytes, [StorageExtent(use) for use in uses])


def _make_index(root: Node, storages: list[StorageEntry]) -> Index:
    """An index that belongs to no save yet."""
    return Index(
        format_version=FORMAT_VERSION,
        save_id="",
        rank=0,
        world_size=1,
        step=None,
        independent=False,
        byteorder=native_byteorder(),
        pickle_size=0,
        storages=storages,
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
    index = _make_index(root, [use.entry() for use in walker.uses])
    opaque = {id(node): opaque_value for node, opaque_value, _ in walker.opaque}
    return DescribedValue(index, [use.storage for use in walker.uses], opaque)


class _CycleError(Exception):
    """A container that holds itself; only a pickle can describe it."""


class _Walker:
    """Walks a state dict once, describing what it meets; every object met stays alive through the state itself."""

    def __init__(self, *, pickling: bool = True) -> None:
        self.uses = StorageUses()
        self.tensors: list[tuple[TensorNode, StorageUse]] = []
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()
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
        number = self._numbers.get(id(value))
        if number is not None:
            if id(value) in self._open:
                raise _CycleError
            return ReferenceNode(number)
        if depth >= MAX_INDEX_DEPTH:
            return self.describe_opaque(value, path)
        if kind is dict or kind is OrderedDict or kind is list or kind is tuple or kind is set or kind is bytearray:
            return self._describe_container(value, path, depth)
        if kind is torch.Size:
            return SizeNode(tuple(value))
        if kind is torch.dtype and value in _DTYPE_NAMES:
            return DtypeNode(_DTYPE_NAMES[value])
        if kind is torch.device:
            return DeviceNode(value.type, value.index)
        return self.describe_opaque(value, path)

    def _describe_container(self, value: Any, path: str, depth: int) -> Node:
        kind = type(value)
        if kind is set and not all(type(item) in _SCALARS for item in value):
            return self.describe_opaque(value, path)
        if kind is not tuple:
            self._numbers[id(value)] = len(self._numbers)
        if kind is bytearray:
            return BytearrayNode(bytes(value))
        self._open.add(id(value))
        node: Node
        if kind is dict:
            node = self._describe_dict(value, path, depth)
        elif kind is OrderedDict:
            pairs = self._pairs(value, path, depth)
            attributes = {name: self.describe(item, f"{path}.{name}", depth + 1) for name, item in vars(value).items()}
            node = OrderedDictNode(pairs, attributes)
        elif kind is set:
            node = SetNode(sorted((scalar_node(item) for item in value), key=encode_node))
        else:
            items = [self.describe(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
            node = ListNode(items) if kind is list else TupleNode(items)
        self._open.discard(id(value))
        return node

    def _describe_dict(self, value: dict[Any, Any], path: str, depth: int) -> Node:
        if all(type(key) is str and key.isascii() for key in value):
            prefix = f"{path}." if path else ""
            return DictNode({key: self.describe(item, prefix + key, depth + 1) for key, item in value.items()})
        return MapNode(self._pairs(value, path, depth))

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[tuple[Node, Node]]:
        prefix = f"{path}." if path else ""
        return [
            (self.describe(key, path, depth + 1), self.describe(item, f"{prefix}{key}", depth + 1))
            for key, item in value.items()
        ]

    def _describe_tensor(self, tensor: torch.Tensor, path: str) -> Node:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return ReferenceNode(number)
        device_type = tensor.device.type
        if device_type == "meta":
            raise meta_error(path)
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if (
            dtype is None
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_nested
            or tensor.__dict__
            or device_type in _FOREIGN_MEMORY
            or (_NAMED_TENSORS and tensor.has_names())  # type: ignore[attr-defined]
        ):
            return self.describe_opaque(tensor, path)
        self._numbers[id(tensor)] = len(self._numbers)
        shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        use = self.uses.add_span(tensor.untyped_storage(), dtype, DTYPES[dtype].itemsize, offset, shape, stride, path)
        flags = "p" if type(tensor) is torch.nn.Parameter else ""
        if tensor.requires_grad:
            flags += "g"
        if tensor.is_conj():
            flags += "c"
        if tensor.is_neg():
            flags += "n"
        node = TensorNode(use.number, dtype, offset, shape, stride, flags)
        self.tensors.append((node, use))
        return node

    def describe_opaque(self, value: Any, path: str) -> Node:
        """A value that goes into the pickle as Python's own pickler writes it."""
        node = OpaqueNode(0, 0, 0, (), type_name(value))
        if self._pickling:
            rehearsed = self._pickler.rehearse(value, path)
            warn_if_refused(rehearsed, value, path)
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


def meta_error(path: str) -> UnsupportedStateError:
    """The error for a tensor without data."""
    return UnsupportedStateError(
        f"the tensor at key {path!r} is on the meta device and has no data to save; nothing was written. "
        "Materialise it first (for a module: module.to_empty(device=...) and load its weights).",
        tensor=path,
    )
