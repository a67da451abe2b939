"""DTensors as far as checkpoints are concerned: how one is spread, and which memory of this rank it stands on.

The one place that knows DTensor. It is imported only once somebody has made one.
"""

import sys
from typing import Any

import torch

from lastgood._torch_internals import root_mesh
from lastgood.errors import UnsupportedStateError
from lastgood.format.mesh import Layout, Mesh, Placement
from lastgood.format.sharding import has_two_readings, local_shape


def dtensor_class() -> type[torch.Tensor] | None:
    """``DTensor``, or ``None`` as long as this process cannot have one."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor."""
    known = dtensor_class()
    return known is not None and isinstance(value, known)


def local_tensor(tensor: Any) -> torch.Tensor:
    """This rank's part, on the very memory of the DTensor, seen by nobody's autograd."""
    with torch.no_grad():
        return local_tensor_without_grad(tensor)


def local_tensor_without_grad(tensor: Any) -> torch.Tensor:
    """The same where autograd is switched off already: switching costs more than all the rest."""
    local = tensor.to_local()
    if type(local) is torch.Tensor and not local.requires_grad:
        return local
    if hasattr(local, "wait"):
        local = local.wait()  # a collective that is still under way
    return local.detach()  # type: ignore[no-any-return]


class Meshes:
    """The meshes of one state's DTensors, joined as far as that state shows that they belong together.

    FSDP2 beside tensor parallelism leaves some tensors on the whole mesh and others on the part of it along one
    dimension, of which the other parts of the mesh hold replicas. Those are taken as replicated along every dimension
    that other tensors of the state are spread over. A dimension that no tensor is spread over (pipeline stages) divides
    states, not tensors.
    """

    def __init__(self, tensors: list[Any]) -> None:
        self._dimensions: dict[int, set[str]] = {}
        self._roots: dict[int, Any] = {}
        self._described: dict[int, tuple[Mesh, tuple[int, ...]]] = {}
        self._kept: list[Any] = []  # so that identities stay theirs
        for mesh in {id(tensor.device_mesh): tensor.device_mesh for tensor in tensors}.values():
            root = root_mesh(mesh)
            self._kept += (mesh, root)
            self._roots[id(mesh)] = root
            if _names(mesh) and set(_names(mesh)) <= set(_names(root)):
                self._dimensions.setdefault(id(root), set()).update(_names(mesh))

    def describe(self, mesh: Any, rank: int) -> tuple[Mesh, tuple[int, ...]]:
        """The mesh that a DTensor on ``mesh`` is taken to be spread over, and which dimensions of it are those of
        ``mesh``."""
        known = self._described.get(id(mesh))
        if known is None:
            known = self._described[id(mesh)] = self._describe(mesh, rank)
        return known

    def _describe(self, mesh: Any, rank: int) -> tuple[Mesh, tuple[int, ...]]:
        root = self._roots[id(mesh)]
        names, root_names = _names(mesh), _names(root)
        joined = self._dimensions.get(id(root), set())
        if root is mesh or not names or not set(names) <= joined or set(names) == joined:
            return _plain(mesh.mesh, names), tuple(range(len(mesh.mesh.shape)))
        # The part of the root mesh that this rank stands in, along all the dimensions that are joined.
        position = (root.mesh == rank).nonzero()[0].tolist()
        part = root.mesh[
            tuple(slice(None) if name in joined else place for name, place in zip(root_names, position, strict=True))
        ]
        order = [name for name in root_names if name in joined]
        return _plain(part, tuple(order)), tuple(order.index(name) for name in names)


def own_mesh(mesh: Any) -> Mesh:
    """A device mesh by itself."""
    return _plain(mesh.mesh, _names(mesh))


def _names(mesh: Any) -> tuple[str, ...]:
    return tuple(mesh.mesh_dim_names or ())


def _plain(ranks: torch.Tensor, names: tuple[str, ...]) -> Mesh:
    return Mesh(tuple(ranks.shape), names or None, tuple(ranks.flatten().tolist()))


def placements_of(tensor: Any, path: str) -> list[Placement]:
    """The placements along the dimensions of the tensor's own mesh.

    Raises :class:`~lastgood.errors.UnsupportedStateError` for sums that have not been taken yet, and for kinds of
    placement that lastgood does not know.
    """
    found = []
    for placement in tensor.placements:
        # A strided shard is a private class of torch's, and of other bases in other versions; its two numbers are not.
        if type(placement).__name__ == "_StridedShard":
            found.append(Placement(placement.dim % tensor.dim(), int(placement.split_factor)))
        elif placement.is_shard():
            found.append(Placement(placement.dim % tensor.dim()))
        elif placement.is_replicate():
            found.append(Placement(None))
        elif placement.is_partial():
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is a partial sum ({placement}): each rank holds a summand, and no rank "
                "the value. Nothing was written. Finish it first: tensor.redistribute(placements=[Replicate(), ...]).",
                tensor=path,
            )
        else:
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is placed as {placement}, which lastgood does not know; nothing was "
                "written. Redistribute it to Shard or Replicate first.",
                tensor=path,
            )
    return found


def require_usual_shards(layout: Layout, rank: int, local: torch.Tensor) -> None:
    """Raise :class:`~lastgood.errors.UnsupportedStateError` unless the local tensor is as large as DTensor makes it."""
    if has_two_readings(layout):
        raise UnsupportedStateError(
            f"the tensor at key {layout.name!r} of shape {layout.shape} is placed as "
            f"{', '.join(map(str, layout.placements))} on a mesh of {layout.mesh.shape}, which does not divide it "
            "evenly: torch's own parts do not agree who holds what then. Nothing was written. Pad it to a size that "
            "divides, or redistribute it first.",
            tensor=layout.name,
            rank=rank,
        )
    expected = local_shape(layout, rank)
    if tuple(local.shape) != expected:
        raise UnsupportedStateError(
            f"the tensor at key {layout.name!r} has a shard of shape {tuple(local.shape)} on rank {rank}, where its "
            f"placements {', '.join(map(str, layout.placements))} on a mesh of {layout.mesh.shape} give one of "
            f"{expected}; nothing was written. Shards of sizes of one's own (DTensor.from_local) cannot be found "
            "again: use distribute_tensor.",
            tensor=layout.name,
            rank=rank,
        )
