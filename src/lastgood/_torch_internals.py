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


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    """The storage as the pickles of tensors name it: with a dtype.

    ``torch.load`` makes the same object for its own unpickler; without the switch torch warns that it is deprecated.
    """
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def version_of(tensor: torch.Tensor) -> int | None:
    """How often the tensor, or a view of the same memory, has been changed in place as autograd counts it.

    ``None`` for tensors made in inference mode, which are not counted. Kernels that write past autograd (fused
    optimizers, batch normalisation, ``.data``) are not counted either.
    """
    return None if tensor.is_inference() else tensor._version


def root_mesh(mesh: Any) -> Any:
    """The device mesh that this one is a part of, or the mesh itself.

    Which other ranks hold replicas of a tensor on a part of a mesh can be seen from nothing public.
    """
    root = getattr(mesh, "_get_root_mesh", None)
    if root is None:  # before torch 2.10
        from torch.distributed.device_mesh import _mesh_resources

        root = lambda: _mesh_resources.get_root_mesh(mesh)  # noqa: E731
    return root() or mesh
