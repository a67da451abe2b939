"""From a staged image back to a state dict, in the processes that made it: for writers of the user's own.

Unlike a file's, the pickle of such an image was made by this process or its trainer: it may name any class.
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from lastgood._torch_internals import typed_storage
from lastgood.format.image import FIRST_STORAGE, DataLayout
from lastgood.format.spec import DTYPES, QUANTIZED_STORAGE_CLASSES

_DTYPES: dict[str | None, torch.dtype] = {
    name: getattr(torch, dtype)
    for dtype, name in (
        *((dtype, info.storage_class) for dtype, info in DTYPES.items() if info.storage_class),
        *QUANTIZED_STORAGE_CLASSES.items(),
    )
}
"""By the names of storage classes: asking the classes themselves warns that they are deprecated."""


def rebuild_state(memory: memoryview, layout: DataLayout, *, copy: bool = False) -> Any:
    """The value that was captured into the image that begins at ``memory``; its tensors are on the CPU.

    They stand on this very memory, or with ``copy`` on memory of their own.
    """
    contents = [memory[record.data_offset : record.data_end] for record in layout.records]
    return _Rebuilder(contents[0], contents[FIRST_STORAGE:], copy=copy).load()


class _Rebuilder(pickle.Unpickler):
    def __init__(self, pickled: memoryview, storages: Sequence[memoryview], *, copy: bool) -> None:
        super().__init__(io.BytesIO(pickled))
        self._memory = storages
        self._copy = copy
        self._made: dict[str, torch.UntypedStorage] = {}

    def persistent_load(self, identity: tuple[Any, ...]) -> Any:
        """The storage that a persistent id of torch's names."""
        _, storage_class, key, _, _ = identity
        storage = self._made.get(key)
        if storage is None:
            storage = self._made[key] = self._storage(self._memory[int(key)])
        return typed_storage(storage, _DTYPES.get(storage_class.__name__, torch.uint8))

    def _storage(self, memory: memoryview) -> torch.UntypedStorage:
        if not memory:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        return (tensor.clone() if self._copy else tensor).untyped_storage()
