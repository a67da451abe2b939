"""Memory for the storages of a file that is loaded, and the tensors on it."""

import functools
from typing import Any

import msgspec
import torch

from lastgood._torch_internals import negative_view
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import Index, InvalidIndexError, StorageEntry
from lastgood.format.nodes import TensorNode, element_span
from lastgood.format.read_plan import Request
from lastgood.format.spec import DTYPES, UNTYPED
from lastgood.storage._direct_io import aligned_buffer

_LARGEST_ITEM = max(info.itemsize for info in DTYPES.values())

MapLocation = Any
"""What ``torch.load`` takes as ``map_location``: None, a device or its name, a dict of names, or a function."""

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name; ``InvalidIndexError`` if this torch has none."""
    if name not in _TORCH_DTYPES:
        raise InvalidIndexError(f"the dtype {name!r}, which torch {torch.__version__} does not have")
    return _TORCH_DTYPES[name]


_OWN_PAGES_FROM = 1024 * 1024


def new_storage(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """A storage whose bytes are not yet set.

    A large one on the CPU has pages of its own: the device reads straight into them, and huge pages spare most of the
    page faults, which cost more than the copying does. As with a mapped file, it cannot be resized.
    """
    if device == "cpu" and nbytes >= _OWN_PAGES_FROM:
        return torch.frombuffer(aligned_buffer(nbytes), dtype=torch.uint8).untyped_storage()
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


def copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """The same bytes in memory of their own."""
    return storage.clone()  # type: ignore[no-untyped-call,no-any-return]


def map_file(path: str, size: int) -> torch.UntypedStorage:
    """The first ``size`` bytes of a file, read lazily as they are touched; changes to them stay in memory."""
    return torch.UntypedStorage.from_file(path, False, size)  # type: ignore[return-value]


class _Holding(msgspec.Struct, gc=False):
    """The part of one storage that will be in memory, and what was made for it."""

    node: TensorNode
    users: int = 0
    start: int = 0
    end: int = 0
    storage: Any = None
    tensor: Any = None


class StoragePool:
    """Memory for tensors that are newly made: ask first, then allocate, read, and make the tensors."""

    def __init__(self, entries: list[StorageEntry], map_location: MapLocation) -> None:
        self._entries = entries
        self._map_location = map_location
        self._holdings: dict[int, _Holding] = {}
        self._given: dict[int, torch.UntypedStorage] = {}

    def give(self, number: int, storage: torch.UntypedStorage) -> None:
        """Use this memory, which holds storage ``number`` from its first byte on, instead of reading it."""
        self._given[number] = storage

    def ask(self, node: TensorNode) -> None:
        """Note that this tensor will be made."""
        if node.storage in self._given:
            return
        holding = self._holdings.get(node.storage)
        if holding is None:
            holding = self._holdings[node.storage] = _Holding(node)
        start, end = byte_range(node)
        if self._entries[node.storage].dtype == UNTYPED:
            # Tensors of several dtypes may follow, and each counts its offset in its own elements: the memory begins
            # where all can count from, and is no tensor's alone.
            start -= start % _LARGEST_ITEM
            holding.users += 1
        if holding.start == holding.end:
            holding.start, holding.end = start, end
        elif start < end:
            holding.start, holding.end = min(holding.start, start), max(holding.end, end)
        holding.users += 1

    def allocate(self) -> list[Request]:
        """Make room for everything asked for; returns what must be read into it."""
        if self.without_data:
            for number, holding in self._holdings.items():
                holding.storage = new_storage(self._entries[number].nbytes, "meta")
                holding.start = 0
            return []
        self._try_locations()
        requests = []
        for number, holding in self._holdings.items():
            if holding.end - holding.start < _OWN_PAGES_FROM and _is_whole_tensor(holding):
                node = holding.node
                holding.tensor = torch.empty(node.shape, dtype=_TORCH_DTYPES[node.dtype])
                address = holding.tensor.data_ptr()
            else:
                holding.storage = new_storage(holding.end - holding.start)
                address = holding.storage.data_ptr()
            if holding.start < holding.end:
                requests.append(Request(FIRST_STORAGE + number, holding.start, holding.end, address))
        return requests

    @property
    def without_data(self) -> bool:
        """Whether everything goes to the meta device, so that nothing need be read."""
        return is_meta(self._map_location)

    def _try_locations(self) -> None:
        """Find out before anything is read whether what will be read can go where it belongs."""
        if self._map_location is None or isinstance(self._map_location, (str, torch.device, dict)):
            for location in {self._entries[number].location for number in self._holdings}:
                if location != "cpu" or self._map_location is not None:
                    relocated(new_storage(0), location, self._map_location)

    def relocate(self) -> None:
        """Move what has been read to the devices where it belongs."""
        for number, holding in self._holdings.items():
            location = self._entries[number].location
            if self._map_location is None and location == "cpu":
                continue
            if holding.storage is None and holding.tensor is not None:
                holding.storage = holding.tensor.untyped_storage()
                holding.tensor = None
            if holding.storage is not None and holding.storage.device.type != "meta":
                holding.storage = relocated(holding.storage, location, self._map_location)

    def tensor(self, node: TensorNode) -> torch.Tensor:
        """The tensor of this node, on memory that it shares with the others of its storage."""
        given = self._given.get(node.storage)
        if given is not None:
            return tensor_on(given, 0, node)
        holding = self._holdings[node.storage]
        if holding.tensor is not None:
            return with_flags(holding.tensor, node.flags)
        assert holding.storage is not None  # allocate() has run
        return tensor_on(holding.storage, holding.start, node)


def byte_range(node: TensorNode) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends, in bytes."""
    span = element_span(node.shape, node.stride)
    itemsize = DTYPES[node.dtype].itemsize
    return (node.offset * itemsize, (node.offset + span) * itemsize) if span else (0, 0)


@functools.lru_cache(maxsize=4096)
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _is_whole_tensor(holding: _Holding) -> bool:
    node = holding.node
    return holding.users == 1 and holding.start < holding.end and node.stride == contiguous_stride(node.shape)


def tensor_on(storage: torch.UntypedStorage, first_byte: int, node: TensorNode) -> torch.Tensor:
    """The tensor of ``node`` in memory whose first byte is ``first_byte`` of what was saved (negative: before it)."""
    dtype = _TORCH_DTYPES[node.dtype]
    offset = node.offset - first_byte // dtype.itemsize if 0 not in node.shape else 0
    tensor = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, node.shape, node.stride)
    return with_flags(tensor, node.flags)


def with_flags(tensor: torch.Tensor, flags: str) -> torch.Tensor:
    """The tensor with the bits that the index notes: conjugate, negative, Parameter, requires grad."""
    if not flags:
        return tensor
    if "c" in flags:
        tensor = tensor.conj()
    if "n" in flags:
        tensor = negative_view(tensor)
    if "p" in flags:
        return torch.nn.Parameter(tensor, requires_grad="g" in flags)
    return tensor.requires_grad_("g" in flags)


def relocated(storage: torch.UntypedStorage, location: str, map_location: MapLocation) -> torch.UntypedStorage:
    """The storage where ``map_location`` wants it, with the meaning that ``torch.load`` gives it."""
    restore: Any = torch.serialization.default_restore_location
    if isinstance(map_location, (str, torch.device)):
        return restore(storage, str(map_location))  # type: ignore[no-any-return]
    if isinstance(map_location, dict):
        location = map_location.get(location, location)
    elif map_location is not None:
        result = map_location(storage, location)
        if result is not None:
            return result  # type: ignore[no-any-return]
    try:
        return restore(storage, location)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if _is_device(location):  # of which this machine has none: torch's error says what to do
            raise
        raise InvalidIndexError(f"a storage on {location!r}, which is no device that this torch knows") from error


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def is_meta(map_location: MapLocation) -> bool:
    """Whether everything goes to the meta device, so that no data need be read."""
    return isinstance(map_location, (str, torch.device)) and str(map_location).partition(":")[0] == "meta"


def map_storages(
    index: Index, mapped: torch.UntypedStorage, offsets: list[int], pool: StoragePool, map_location: MapLocation
) -> None:
    """Give the pool views of a mapped file, one a storage, moved where ``map_location`` wants them."""
    for number, (entry, offset) in enumerate(zip(index.storages, offsets, strict=True)):
        storage = mapped[offset : offset + entry.nbytes]
        if map_location is not None or entry.location != "cpu":
            storage = relocated(storage, entry.location, map_location)
        pool.give(number, storage)
