"""Which bytes of which storages a state dict uses."""

from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from lastgood._memory import address_of, bytes_at, copy_memory
from lastgood.format.index import StorageEntry
from lastgood.format.spec import DTYPES, UNTYPED

_WITHOUT_BYTES = frozenset({"meta", "xla", "maia", "lazy"})
"""Device types whose storages have no memory that could be copied."""


class UnsavableStorageError(Exception):
    """Why a storage cannot be saved, as the end of a sentence that names its tensor."""


class StorageUse(msgspec.Struct, gc=False):
    """The used span of one storage, in bytes from ``start`` up to ``end``, growing while the state is walked."""

    number: int
    storage: Any
    dtype: str
    on_cpu: bool
    start: int = -1
    end: int = -1

    @property
    def nbytes(self) -> int:
        """How many bytes will be saved."""
        return self.end - self.start

    def copy_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of the span from ``offset`` on."""
        if self.on_cpu:
            copy_memory(address_of(target), self.storage.data_ptr() + self.start + offset, len(target))
            return
        host = self._from_device(offset, len(target))
        copy_memory(address_of(target), host.data_ptr(), len(target))

    def to_bytes(self) -> bytes:
        """A copy of all bytes of the span."""
        if self.on_cpu:
            return bytes_at(self.storage.data_ptr() + self.start, self.end - self.start)
        return bytes_at(self._from_device(0, self.nbytes).data_ptr(), self.nbytes)

    def _from_device(self, offset: int, size: int) -> torch.Tensor:
        # Not yet run on a device: a blocking copy of just these bytes to the host.
        return self.device_bytes()[offset : offset + size].cpu()

    def device_bytes(self) -> torch.Tensor:
        """The bytes of the span as a tensor, where they are."""
        return bytes_of(self.storage, self.start, self.end)

    def entry(self) -> StorageEntry:
        """The storage's entry in the index."""
        location = "cpu" if self.on_cpu else location_of(self.storage)
        return StorageEntry(self.end - self.start, self.dtype, location)


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
        span: int,
    ) -> StorageUse:
        """Note that a tensor uses ``span`` elements of ``storage`` from element ``offset`` on."""
        use = self._by_identity.get(id(storage))
        if use is None or use.dtype != dtype:
            use = self._use(storage, dtype)
        if span == 0:
            return use
        start, end = offset * itemsize, (offset + span) * itemsize
        if end > storage.nbytes():
            raise UnsavableStorageError(
                f"needs {end} bytes of a storage that was resized to {storage.nbytes()}; nothing was written. "
                "If it is a sharded parameter, gather it before saving."
            )
        if use.start < 0:
            use.start, use.end = start, end
        elif start < use.start or end > use.end:
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
            device_type = storage.device.type
            if device_type in _WITHOUT_BYTES:
                raise UnsavableStorageError(without_bytes(storage.device))
            use = self._by_identity[id(storage)] = StorageUse(
                len(self._by_identity), storage, dtype, device_type == "cpu"
            )
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


def bytes_of(storage: torch.UntypedStorage, start: int, end: int) -> torch.Tensor:
    """The bytes of a storage as a tensor on its memory, on whichever device that is."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[start:end]


def without_bytes(device: torch.device) -> str:
    """Why what is on this device cannot be saved, as the end of a sentence that names its tensor."""
    return (
        f"is on the device {device}, which has no bytes to save; nothing was written. "
        "Move it to the CPU, or materialise it (for a module: module.to_empty(device=...)), first."
    )


def location_of(storage: torch.UntypedStorage) -> str:
    """torch's name for where a storage lives, such as ``cpu`` or ``cuda:0``."""
    if storage.device.type == "cpu":
        return "cpu"
    return str(torch.serialization.location_tag(storage))
