"""A model spread over ranks by FSDP2 with its optimizer, and the same state in other layouts to load it into.

All values follow from a tensor's name and the position in the whole tensor: each rank knows what its part has to be.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from states import leaves
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, zeros

Tree = dict[str, Any]

LAYERS = 9
WIDTH_STEP = 16
VOCABULARY_PER_WIDTH = 42

SAME, COLUMNS, GRID = "same", "columns", "grid"
"""What a state can be loaded into: the layout that it was saved from; all matrices divided by columns, as tensor
parallelism does it; a mesh of two dimensions, of which one divides the rows and one the columns."""

_LARGEST = 0x3FFFFFFF
"""As the bits of a float32: no NaN, which would not equal itself."""


class Training:
    """A GPT-like model in float32 and its AdamW, of about ``nbytes`` bytes over all ranks; several sizes are odd.

    FSDP2 divides it by rows over all ranks; with ``replicas``, each of so many groups of ranks has all of it (HSDP).
    """

    def __init__(self, nbytes: int, replicas: int = 1) -> None:
        width = WIDTH_STEP
        while _training_bytes(width + WIDTH_STEP) <= nbytes:
            width += WIDTH_STEP
        ranks = dist.get_world_size()
        mesh = _row()
        if replicas > 1:
            mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
        with torch.device("meta"):
            self._model = _gpt(width)
        for part in self._model:
            fully_shard(part, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        self._model.to_empty(device="cpu")
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-4, weight_decay=0.1)
        for parameter in self._model.parameters():
            nn.init.zeros_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, tensor in tensors_of(self.tree()):
            local(tensor).copy_(_expected(name, tensor))

    def tree(self) -> Tree:
        """What one saves of it, gathered anew."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer, "step": 1000, "arguments": {"learning_rate": 3e-4}}


def tensors_of(tree: Tree) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors, spread or not, by name."""
    return ((name, value) for name, value in leaves(tree) if isinstance(value, torch.Tensor))


def whole_bytes(tree: Tree) -> int:
    """The bytes of all tensors, each counted once for all ranks."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_of(tree))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, on the tensor's own memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def empty_like(tree: Tree, place: str) -> Tree:
    """The same structure with zeros, laid out as ``place`` says: something to load into."""
    layout = _LAYOUTS[place]()

    def made(value: Any) -> Any:
        if isinstance(value, DTensor):
            mesh, placements = layout(value)
            return zeros(value.shape, dtype=value.dtype, device_mesh=mesh, placements=placements)
        if isinstance(value, torch.Tensor):
            return torch.zeros_like(value)
        if isinstance(value, dict):
            return {key: made(item) for key, item in value.items()}
        return [made(item) for item in value] if isinstance(value, list) else value

    copied: Tree = made(tree)
    return copied


def require_loaded(tree: Tree, like: Tree) -> None:
    """Raise ``ValueError`` unless this rank's part of every tensor has the values that a training begins with."""
    found, expected = dict(leaves(tree)), dict(leaves(like))
    if found.keys() != expected.keys():
        raise ValueError("other names than were saved")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            if value != expected[name]:
                raise ValueError(f"another value of {name} than was saved")
        elif not torch.equal(_bits(local(value)), _bits(_expected(name, value))):
            raise ValueError(f"other bits of {name} than were saved")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def _expected(name: str, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of the tensor, cut by torch itself."""
    first = zlib.crc32(name.encode()) & _LARGEST >> 1
    numbers = torch.arange(first, first + like.numel(), dtype=torch.int32).bitwise_and_(_LARGEST)
    whole = numbers.view(torch.float32).reshape(like.shape)
    if not isinstance(like, DTensor):
        return whole
    return local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))


Layout = Callable[[DTensor], tuple[DeviceMesh, list[Placement]]]


def _row() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


def _same() -> Layout:
    return lambda tensor: (tensor.device_mesh, list(tensor.placements))


def _columns() -> Layout:
    mesh = _row()
    return lambda tensor: (mesh, [Shard(tensor.dim() - 1)])


def _grid() -> Layout:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rows", "columns"))
    return lambda tensor: (mesh, [Shard(0), Shard(1) if tensor.dim() > 1 else Replicate()])


_LAYOUTS: dict[str, Callable[[], Layout]] = {SAME: _same, COLUMNS: _columns, GRID: _grid}


def _gpt(width: int) -> nn.Sequential:
    """The parameters of a GPT; it is never run."""
    blocks = [_block(width) for _ in range(LAYERS)]
    return nn.Sequential(nn.Embedding(VOCABULARY_PER_WIDTH * width + 7, width), *blocks, nn.LayerNorm(width))


def _block(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 3 * width),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width + 3),
        nn.Linear(4 * width + 3, width),
    )


def _training_bytes(width: int) -> int:
    with torch.device("meta"):
        return 3 * 4 * sum(parameter.numel() for parameter in _gpt(width).parameters())
