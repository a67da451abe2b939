"""What ranks do when told to while their sharded states are being staged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.matrix_layouts import Training, bits, local, tensors_of
from tests.distributed.matrix_ranks import checkpointer_of, rank
from tests.helpers.asynchronous import LARGE, gate_before_copies, watched_calls
from tests.helpers.workers import PATIENCE_SECS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lastgood._staging import plan
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import LastgoodError

Bits = dict[str, Any]


def _checkpointer() -> AsyncCheckpointer:
    checkpointer = checkpointer_of(asynchronous=True, replicated=True)
    assert isinstance(checkpointer, AsyncCheckpointer)
    return checkpointer


def _snapshot(state: Any) -> Bits:
    return {path: bits(local(tensor)) for path, tensor in tensors_of(state)}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor).view(-1).view(torch.uint8)


def _load(path: str, state: Any) -> Bits:
    """Load into the state itself."""
    for _, tensor in tensors_of(state):
        _bytes_of(tensor).fill_(77)
    _checkpointer().load(path, state, strict=True)
    return _snapshot(state)


def large_state() -> dict[str, Any]:
    """Tensors whose parts on each rank are copied in the background, spread and declared to be the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    elements = dist.get_world_size() * LARGE // 2
    spread = torch.arange(float(elements)).view(-1, 4)
    return {
        "spread": {
            "divided": distribute_tensor(spread.clone(), mesh, [Shard(0)], src_data_rank=None),
            "everywhere": distribute_tensor(spread.clone(), mesh, [Replicate()], src_data_rank=None),
        },
        "model": {"same": spread.clone(), "running": torch.zeros(10)},
        "number": 0,
    }


def save_again_and_again(path: str, count: int) -> list[int]:
    """Save so many states of one structure, each with other values; how often each was captured."""
    checkpointer, training, captured = _checkpointer(), Training("fsdp", 1), []
    large = large_state()
    real = plan.capture
    calls = []

    def capture(state: Any) -> Any:
        calls.append(None)
        return real(state)

    expected = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "capture", capture)
        for number in range(count):
            state = {**training.state(), **large, "number": number}
            before = len(calls)
            for future in checkpointer.save(f"{path}-{number}", state):
                future.result(PATIENCE_SECS)
            captured.append(len(calls) - before)
            expected.append(_snapshot(state))
            for _, tensor in tensors_of(state):
                _bytes_of(tensor).bitwise_xor_(1)
    for number, wanted in enumerate(expected):
        state = {**training.state(), **large_state(), "number": None}
        found = _load(f"{path}-{number}", state)
        assert state["number"] == number
        for name, value in wanted.items():
            assert found[name] == value, f"{name} of save {number}"
    return captured


def _by_dtensor(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def _by_local_tensor(tensor: torch.Tensor) -> None:
    local(tensor).fill_(3)


def _past_autograd(tensor: torch.Tensor) -> None:
    local(tensor).numpy()[...] = 4


def _by_counted_dtensor(tensor: torch.Tensor) -> None:
    """A change that no sampled byte shows: only the DTensor's version counter does, and not that of its local part."""
    with torch.no_grad():
        tensor.mul_(1)


CHANGES: dict[str, Callable[[torch.Tensor], None]] = {
    "dtensor": _by_dtensor,
    "counted": _by_counted_dtensor,
    "local": _by_local_tensor,
    "numpy": _past_autograd,
}


def tear(path: str, group: str, name: str, how: str, changing: int) -> Exception | None:
    """Save, and change one tensor on one rank before it is copied; what became of the save here."""
    state = large_state()
    with gate_before_copies() as gate:
        gate.shut()
        staged, written = _checkpointer().save(path, state)
        gate.wait_until_reached()
        if rank() == changing:
            CHANGES[how](state[group][name])
        gate.open()
        try:
            staged.result(PATIENCE_SECS)
            written.result(PATIENCE_SECS)
        except LastgoodError as error:
            return error
    return None


def step_while_staging(path: str) -> list[str]:
    """Save, and let an optimizer of DTensors step before all is copied; how that call went."""
    state = large_state()
    parameters = [torch.nn.Parameter(tensor) for tensor in state["spread"].values()]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state["spread"] = dict(zip(state["spread"], parameters, strict=True))
    state["optim"] = {str(number): optimizer.state[each] for number, each in enumerate(parameters)}
    expected = _snapshot(state)
    news = []
    with gate_before_copies() as gate, watched_calls() as calls:
        gate.shut()
        _, written = _checkpointer().save(path, state)
        gate.wait_until_reached()
        calls.start(optimizer.step)
        news.append(calls.next())
        gate.open()
        news.append(calls.next())
        written.result(PATIENCE_SECS)
        calls.join()
    assert _snapshot(state) != expected
    assert _load(path, state) == expected
    return news


def save_replicas(path: str, value: float, drifted: int | None) -> Exception | None:
    """Save a state of one structure with another value each time; one rank's may be another one."""
    state = large_state()
    state["model"]["same"].fill_(value + (0.5 if rank() == drifted else 0))
    state["model"]["running"].fill_(value)
    expected = _snapshot(state)
    try:
        for future in _checkpointer().save(path, state):
            future.result(PATIENCE_SECS)
    except LastgoodError as error:
        return error
    assert _load(path, state) == expected
    return None


def change_running_statistics_while_staging(path: str, changing: int) -> Exception | None:
    """Save, and change a small tensor on one rank at once, as a forward pass may that one rank begins earlier."""
    state = large_state()
    expected = _snapshot(state)
    with gate_before_copies() as gate:
        gate.shut()
        _, written = _checkpointer().save(path, state)
        gate.wait_until_reached()
        if rank() == changing:
            state["model"]["running"].add_(1)
        gate.open()
        try:
            written.result(PATIENCE_SECS)
        except LastgoodError as error:
            return error
    assert _load(path, state) == expected
    return None
