"""What ranks do whose model is sharded by FSDP2: a run that other numbers of ranks go on with."""

from typing import Any

import torch
import torch.distributed
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import manager_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lastgood.errors import LastgoodError

_this_process: dict[str, Any] = {}


class AppState:
    """Model and optimizer as one object, the way PyTorch's guides for distributed checkpoints do it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


class Position:
    """Where a rank stands in its data: not the same on all of them."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def new_training(seed: int, *, is_sharded: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))
    if is_sharded:
        fully_shard(model[0])
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(12, 7, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(value: Any) -> Any:
    """A state with every tensor whole, in memory of its own."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        gathered = value.full_tensor() if hasattr(value, "full_tensor") else value
        return gathered.detach().clone()
    return [whole(item) for item in value] if isinstance(value, list) else value


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, how: str) -> dict[str, Any]:
    position = Position(100 + torch.distributed.get_rank())
    if how == "objects":
        return {"model": model, "optimizer": optimizer, "position": position}
    return {"app": AppState(model, optimizer), "position": position}


def save(root: str, how: str, **options: Any) -> dict[str, Any]:
    """Train for two steps and save; the state as whole tensors."""
    model, optimizer = new_training(1)
    for seed in (1, 2):
        take_step(model, optimizer, seed)
    with manager_of(root, **options) as manager:
        manager.save(2, _state(model, optimizer, how)).result(PATIENCE_SECS)
    return {"model": whole(model.state_dict()), "optimizer": whole(optimizer.state_dict())}


def resume(root: str, how: str, per_rank: Any, **options: Any) -> tuple[Any, dict[str, Any] | str, int]:
    """Go on with a training that has not stepped yet; what it holds then, or the error, and this rank's position."""
    model, optimizer = new_training(50)
    before = whole(model.state_dict())
    state = _state(model, optimizer, how)
    state["position"].value = -1
    with manager_of(root, **options) as manager:
        try:
            step = manager.restore(state, per_rank=per_rank)
        except LastgoodError as error:
            assert all(torch.equal(before[name], value) for name, value in whole(model.state_dict()).items())
            return type(error).__name__, str(error), state["position"].value
    found = {"model": whole(model.state_dict()), "optimizer": whole(optimizer.state_dict())}
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                assert (value.device_mesh, value.placements) == (parameter.device_mesh, parameter.placements), name
    take_step(model, optimizer, 3)  # the optimizer can go on with what it was given
    return step, found, state["position"].value


def save_replicas(root: str, drifts: bool) -> str:
    """The state of data parallelism; on rank 1 one buffer may have drifted."""
    torch.manual_seed(4)
    weights, buffer = torch.randn(1024, 3000), torch.zeros(5)
    if drifts and torch.distributed.get_rank() == 1:
        buffer[3] = 1.0
    state = {"model": {"weights": weights, "buffer": buffer}, "own": torch.distributed.get_rank()}
    try:
        with manager_of(root, replicated=["model.*"], on_failure="raise") as manager:
            manager.save(1, state).result(PATIENCE_SECS)
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def save_with_random_states(root: str) -> None:
    torch.manual_seed(1000 + torch.distributed.get_rank())
    with manager_of(root, random_states=True) as manager:
        manager.save(2, {"value": 1}).result(PATIENCE_SECS)


def resume_with_random_states(root: str, rules: Any) -> tuple[Any, list[float]]:
    with manager_of(root, random_states=True) as manager:
        try:
            return manager.restore({"value": None}, per_rank=rules), torch.rand(3).tolist()
        except LastgoodError as error:
            return type(error).__name__, []
