"""The few names of torch that are not public and cannot be done without, each with the reason.

tests/unit/test_torch_internals.py fails when torch changes one of them.
"""

from typing import Any

import torch


def untyped_storage_of(storage: Any) -> "torch.UntypedStorage | None":
    """The storage itself, if the object is one (typed or untyped); else ``None``.

    ``TypedStorage.untyped`` is public but warns that typed storages are deprecated; torch's own reductions of
    quantised tensors and of tensors with attributes still hand them out.
    """
    if isinstance(storage, torch.UntypedStorage):
        return storage
    if isinstance(storage, torch.storage.TypedStorage):
        return storage._untyped_storage
    return None


def negative_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose values are the negated ones (``Tensor.neg`` would compute and copy them)."""
    return torch._neg_view(tensor)
