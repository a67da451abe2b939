"""What a description of tensors depends on: read in the interpreter's C loops, as there may be very many of them."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
import torch

_LARGEST_ELEMENT = 16
"""Of any dtype, in bytes. One that stands alone may have any stride."""

_BATCH = 2_000
"""How many tensors are asked for one property without letting another thread run."""


class TensorFacts(msgspec.Struct):
    """All that a description of tensors depends on, but for their names and data; a list each, in the walk's order.

    ``storages`` numbers the storages by their first appearance, ``offsets`` and ``nbytes`` are in bytes.
    ``repeats`` says which tensor is the same object as which one before.
    """

    properties: list[list[Any]]
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Shape and strides of those of two and more dimensions, of one element or none, or that are not contiguous: of the
    others, bytes, dtype and number of dimensions say as much, and reading them takes a fraction of the time."""

    storages: list[int]
    offsets: list[int]
    storage_nbytes: list[int]
    repeats: list[int] | None
    nbytes: list[int]
    all_contiguous: bool

    def quick_matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether as many bytes can be read from where each of them begins as from those of the plan."""
        try:
            return (
                self.all_contiguous
                and all(map(torch.Tensor.is_contiguous, tensors))
                and read_property(tensors, _device) == self.properties[_READERS.index(_device)]
                and list(map(_nbytes, tensors)) == self.nbytes
                and _repeats(tensors) == self.repeats
            )
        except RuntimeError:
            return False


_nbytes = attrgetter("nbytes")
_device = attrgetter("device")
_READERS: list[Any] = [
    attrgetter("dtype"),
    torch.Tensor.dim,
    torch.Tensor.is_contiguous,
    attrgetter("requires_grad"),
    torch.Tensor.is_neg,
    _device,
]
if hasattr(torch.Tensor, "has_names"):
    _READERS.append(torch.Tensor.has_names)  # type: ignore[attr-defined]


def facts_of(tensors: Sequence[torch.Tensor]) -> TensorFacts | None:
    """``None`` if there is a tensor among them that is more than a view of one storage."""
    if any(map(vars, tensors)):
        return None  # attributes of the user's own go into the pickle
    try:
        properties = [read_property(tensors, reader) for reader in _READERS]
        storages = read_property(tensors, torch.Tensor.untyped_storage)
        bases = read_property(storages, torch.UntypedStorage.data_ptr)
        starts = read_property(tensors, torch.Tensor.data_ptr)
        nbytes = read_property(tensors, _nbytes)
        dtypes, dimensions, contiguous = properties[:3]
        if any(dtype.is_complex for dtype in set(dtypes)):
            properties.append(read_property(tensors, torch.Tensor.is_conj))
        shapes = [
            (tuple(tensor.shape), tensor.stride())
            for tensor, dimension, is_contiguous, size in zip(tensors, dimensions, contiguous, nbytes, strict=True)
            if dimension > 1 or not is_contiguous or (dimension == 1 and size <= _LARGEST_ELEMENT)
        ]
        storage_nbytes = read_property(storages, torch.UntypedStorage.nbytes)
    except (RuntimeError, NotImplementedError):
        return None
    numbers: dict[int, int] = {}
    numbered = [numbers.setdefault(id(storage), len(numbers)) for storage in storages]
    # An empty tensor may say that it begins nowhere.
    offsets = [start - base if size else 0 for start, base, size in zip(starts, bases, nbytes, strict=True)]
    return TensorFacts(
        properties, shapes, numbered, offsets, storage_nbytes, _repeats(tensors), nbytes, all(contiguous)
    )


def read_property(objects: Sequence[Any], reader: Any) -> list[Any]:
    """One property of all objects. Between batches other threads may run: inside of ``map`` they may not."""
    found: list[Any] = []
    for start in range(0, len(objects), _BATCH):
        found += map(reader, objects[start : start + _BATCH])
    return found


def pointers_of(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    try:
        return list(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:
        return None


def _repeats(tensors: Sequence[torch.Tensor]) -> list[int] | None:
    """For each tensor the position at which it first stands; ``None`` if all are different objects."""
    if len(set(map(id, tensors))) == len(tensors):
        return None
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), position) for position, tensor in enumerate(tensors)]
