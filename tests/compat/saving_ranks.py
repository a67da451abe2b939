"""What the processes of several ranks do to make fixtures."""

import copy
import operator
from typing import Any

import torch
import torch.distributed
from tests.compat.describing import values_of
from tests.compat.states import pattern, ramp
from tests.compat.torch_describing import describe
from tests.distributed.matrix_layouts import Training
from tests.manager.runs import manager_of
from tests.manager.sharded import Position, new_training, take_step
from tests.unit.capture.states import DTYPES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lastgood.builder import make_sync_checkpointer
from lastgood.config import CheckpointerConfig

SEED = 11
STEPS = (2, 4)


def _own() -> dict[str, Any]:
    """What ranks do not have alike."""
    rank = torch.distributed.get_rank()
    return {"position": {"sample": 1000 + rank}, "random": ramp(3, dtype=torch.int64, start=10 * rank)}


def save_layout(path: str, layout: str) -> Any:
    """A model, its optimizer and more, spread in the way of this name; the description of them as whole tensors."""
    shared = {"plain": {"table": ramp(3, 5), "frozen": torch.nn.Parameter(ramp(2), requires_grad=False)}, "epoch": 3}
    checkpointer = make_sync_checkpointer()
    checkpointer.save(path, {**Training(layout, SEED).state(), **shared, **_own()}, step=7)
    checkpointer.close()
    # Not gathered: each layout cuts the values of a training that is in no way distributed.
    return values_of(describe({**Training("plain", SEED).state(), **shared, **_own()}))


def save_thirds(path: str) -> Any:
    """FSDP2 over three of what tensor parallelism has divided in two, of a size where their order makes a difference.

    Of 7 rows tensor parallelism gives out 4 and 3, and FSDP2 of those 2, 2, 0 and 1, 1, 1.
    """

    def layer() -> torch.nn.Linear:
        made = torch.nn.Linear(2, 7)
        made.weight.data, made.bias.data = ramp(7, 2), ramp(7, start=100)
        return made

    sharded = layer()
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(sharded, mesh["tp"], ColwiseParallel())
    fully_shard(sharded, mesh=mesh["dp"])
    checkpointer = make_sync_checkpointer()
    checkpointer.save(path, {"model": sharded.state_dict(), **_own()}, step=7)
    checkpointer.close()
    return values_of(describe({"model": layer().state_dict(), **_own()}))


def save_replicas(path: str) -> Any:
    """Tensors that were declared to be the same on all ranks: one large enough to be divided between them."""
    state = {
        "model": {
            "large": pattern(3 * 700 * 1024).view(3, 700, 1024),  # of more than two shares of a mebibyte
            "small": [ramp(5 + number) for number in range(6)],
            **{str(dtype): torch.tensor([1, 0] * 8, dtype=torch.uint8).view(dtype) for dtype in DTYPES[:5]},
        },
        **_own(),
    }
    checkpointer = make_sync_checkpointer(CheckpointerConfig(replicated=("model.*",)))
    checkpointer.save(path, state, step=7)
    checkpointer.close()
    return values_of(describe(state))


def save_run(root: str) -> list[Any]:
    """A training with FSDP2 that saves twice; the descriptions of what it saved, as whole tensors."""
    model, optimizer = new_training(1)
    position = Position()
    losses: list[float] = []
    saved = []
    with manager_of(root) as manager:
        for step in range(1, STEPS[-1] + 1):
            take_step(model, optimizer, step)
            position.value = 100 * step + torch.distributed.get_rank()
            losses.append(1 / step)
            if step in STEPS:
                # What ranks do not have alike comes last, as it does in what another number of ranks reads.
                state = {
                    "model": model,
                    "optimizer": optimizer,
                    "losses": losses,
                    "the same": {"losses": losses},
                    "position": position,
                }
                manager.save(step, state, metrics={"loss": 1 / step}).result(60)
                saved.append(values_of(describe({name: _whole(value) for name, value in state.items()})))
    return saved


def _whole(value: Any) -> Any:
    """A state, or that of an object, with every tensor whole, its containers and their attributes as they are."""
    if hasattr(value, "state_dict"):
        return _whole(value.state_dict())
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update((key, _whole(item)) for key, item in value.items())
        return made
    if isinstance(value, list):
        items = [_whole(item) for item in value]
        return value if all(map(operator.is_, items, value)) else items
    if isinstance(value, torch.Tensor):
        return value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach().clone()
    return value
