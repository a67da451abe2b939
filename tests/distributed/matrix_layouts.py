"""One model, its optimizer and some more tensors, spread over ranks in each of the ways that trainings use.

All values follow from a seed, and each rank's part of them is cut by torch itself: what a load must give is known to
the bit without asking other ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

DTYPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "halves": (torch.bfloat16, (7, 3)),
    "eighths": (torch.float8_e4m3fn, (11,)),
    "flags": (torch.bool, (5, 2)),
    "phases": (torch.complex64, (3, 4)),
    "scalar": (torch.float32, ()),
    "empty": (torch.float32, (0, 3)),
    "counts": (torch.int64, (9,)),
    "wide": (torch.float32, (41, 50)),
}
"""Tensors beside the model, of sizes that few numbers of ranks divide."""


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers, none of them a NaN."""
    if dtype == torch.complex64:
        return torch.view_as_complex(torch.rand((*shape, 2), generator=generator))
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 1000, shape, generator=generator).to(dtype)


class Net(torch.nn.Module):
    """Of odd sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(13, 6)
        self.up = torch.nn.Linear(6, 23)
        self.norm = torch.nn.LayerNorm(6)
        self.down = torch.nn.Linear(23, 5)
        self.register_buffer("seen", torch.tensor(seed))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = random_tensor(tuple(parameter.shape), torch.float32, generator)


# The layouts: each makes a mesh of all ranks, or none, and spreads a model over it.


def _row(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))


def _grid(world_size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))


def _no_mesh(world_size: int) -> None:
    return None


def _leave(net: Net, mesh: Any) -> None:
    pass


def _fsdp(net: Net, mesh: Any) -> None:
    fully_shard(net.up, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _tensor_parallel(net: Net, mesh: Any) -> None:
    plan = {"emb": RowwiseParallel(input_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(net, mesh, plan)


def _fsdp_and_tensor_parallel(net: Net, mesh: Any) -> None:
    _tensor_parallel(net, mesh["tp"])
    _fsdp(net, mesh["dp"])


_LAYOUTS: dict[str, tuple[Callable[[int], Any], Callable[[Net, Any], None]]] = {
    "plain": (_no_mesh, _leave),
    "ddp": (_no_mesh, _leave),
    "fsdp": (_row, _fsdp),
    "tp": (_row, _tensor_parallel),
    "fsdp-tp": (_grid, _fsdp_and_tensor_parallel),
    "hsdp": (_grid, _fsdp),
}


def _spread(tensor: torch.Tensor, number: int, mesh: DeviceMesh | None) -> torch.Tensor:
    """In one of the ways that its dimensions allow, another one for each number."""
    if mesh is None:
        return tensor
    ways = [*map(Shard, range(tensor.dim())), Replicate()]
    placements = [ways[(number + dimension) % len(ways)] for dimension in range(mesh.ndim)]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, on the tensor's own memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


class Training:
    """A model, an optimizer that has stepped, and other tensors, in one layout."""

    def __init__(self, layout: str, seed: int) -> None:
        make_mesh, spread = _LAYOUTS[layout]
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.mesh = make_mesh(world_size)

        def net(seed: int) -> Net:
            made = Net(seed)
            spread(made, self.mesh)
            return made

        self.net = net(seed)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01, foreach=False)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A step's results depend on the order of additions: what is compared is set.
        for name, source in (("exp_avg", net(seed + 1)), ("exp_avg_sq", net(seed + 2)), ("", net(seed))):
            for parameter, values in zip(self.net.parameters(), source.parameters(), strict=True):
                target = self.optimizer.state[parameter][name] if name else parameter
                local(target).copy_(local(values))
                self.optimizer.state[parameter]["step"].fill_(seed)
        generator = torch.Generator().manual_seed(seed)
        self.extra = {
            name: _spread(random_tensor(shape, dtype, generator), number, self.mesh)
            for number, (name, (dtype, shape)) in enumerate(DTYPES.items())
        }

    def state(self) -> dict[str, Any]:
        """What one would save of it."""
        model, optim = get_state_dict(self.net, self.optimizer)
        return {"model": model, "optim": optim, "extra": self.extra}

    def scribble(self) -> None:
        """Overwrite every tensor."""
        with torch.no_grad():
            for _, tensor in tensors_of(self.state()):
                local(tensor).view(torch.uint8 if tensor.dim() else tensor.dtype).fill_(77)


def tensors_of(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts and lists, by key path."""
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{path}.{key}")
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from tensors_of(value, f"{path}[{number}]")


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What two tensors that are the same to the bit have the same."""
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: Any, expected: Any) -> None:
    """Every tensor of two states is the same to the bit on this rank, and spread in the same way."""
    wanted = dict(tensors_of(expected))
    there = dict(tensors_of(found))
    assert there.keys() == wanted.keys()
    for path, tensor in there.items():
        other = wanted[path]
        assert isinstance(tensor, DTensor) == isinstance(other, DTensor), path
        assert tensor.shape == other.shape, path
        assert bits(local(tensor)) == bits(local(other)), f"{path}: {local(tensor)}, not {local(other)}"
