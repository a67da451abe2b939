"""Which bytes of which storages a state dict uses."""

from collections.abc import Iterator

import torch

from lastgood.errors import UnsupportedStateError
from lastgood.format.index import StorageEntry, element_span
from lastgood.format.spec import DTYPES, UNTYPED


class StorageUse:
    """The used span of one storage, in bytes from ``start`` up to ``end``, growing while the state is walked."""

    __slots__ = ("dtype", "end", "number", "start", "storage")

    def __init__(self, number: int, storage: torch.UntypedStorage, dtype: str) -> None:
        self.number = number
        self.storage = storage
        self.dtype = dtype
        self.start = self.end = -1

    @property
    def nbytes(self) -> int:
        """How many bytes will be saved."""
        return self.end - self.start

    def entry(self) -> StorageEntry:
        """The storage's entry in the index."""
        return StorageEntry(self.nbytes, self.dtype, location_of(self.storage))


class StorageUses:
    """All storages of one state dict, numbered in the order in which they were met."""

    def __init__(self) -> None:
        # Keyed by identity: torch keeps one Python object a storage alive as long as somebody holds it, and we do.
        self._by_identity: dict[int, StorageUse] = {}

    def __iter__(self) -> Iterator[StorageUse]:
        return iter(self._by_identity.values())

    def find(self, storage: torch.UntypedStorage) -> StorageUse:
        """The use of a storage that was met before."""
        return self._by_identity[id(storage)]

    def add_span(
        self,
        storage: torch.UntypedStorage,
        dtype: str,
        itemsize: int,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        path: str,
    ) -> StorageUse:
        """Note that a tensor uses part of ``storage``; offset, shape and stride count its elements."""
        use = self._use(storage, dtype)
        span = element_span(shape, stride)
        if span == 0:
            return use
        start, end = offset * itemsize, (offset + span) * itemsize
        if end > storage.nbytes():
            raise UnsupportedStateError(
                f"the tensor at key {path!r} needs {end} bytes of a storage that was resized to {storage.nbytes()}; "
                "nothing was written. If it is a sharded parameter, gather it before saving.",
                tensor=path,
            )
        if use.start < 0:
            use.start, use.end = start, end
        else:
            use.start, use.end = min(use.start, start), max(use.end, end)
        return use

    def add_whole(self, storage: torch.UntypedStorage, dtype: str) -> StorageUse:
        """Note that all of ``storage`` is used."""
        use = self._use(storage, dtype)
        use.start, use.end = 0, storage.nbytes()
        return use

    def _use(self, storage: torch.UntypedStorage, dtype: str) -> StorageUse:
        use = self._by_identity.get(id(storage))
        if use is None:
            use = self._by_identity[id(storage)] = StorageUse(len(self._by_identity), storage, dtype)
        elif use.dtype != dtype:
            use.dtype = UNTYPED
        return use

    def settle(self) -> None:
        """Fix all spans; called once the whole state has been walked."""
        for use in self:
            if use.start < 0:
                use.start = use.end = 0
            if use.dtype == UNTYPED:
                # Tensors of several dtypes count offsets in their own elements: start where all can.
                use.start -= use.start % max(info.itemsize for info in DTYPES.values())


def location_of(storage: torch.UntypedStorage) -> str:
    """torch's name for where a storage lives, such as ``cpu`` or ``cuda:0``."""
    if storage.device.type == "cpu":
        return "cpu"
    return str(torch.serialization.location_tag(storage))
