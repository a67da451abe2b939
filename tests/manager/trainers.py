"""What runs in processes of their own: trainings with a manager, and managers that stop where they are to be killed."""

import random
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy
import torch
from tests.crash.stopping import Stop, StoppingFileOps
from tests.manager.runs import manager_of, restore, tiny
from tests.process import in_child
from tests.survival.trainers import process_of

from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.manager import checkpoint_manager
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast


def resume_save_and_tidy(pipe: Connection | None, root: str, place: int) -> list[str]:
    """The life of a run: resumes from its newest step, saves that step anew, and keeps the last two.

    It stops before the given one of the file operations of save and retention; returns the names of all.
    """
    operations = StoppingFileOps(Stop(None, -1))
    manager = manager_of(root, ops=operations, keep=KeepLast(2))
    step, _ = restore(manager)
    assert step is not None
    manager.wait()
    stop = operations._stop = Stop(pipe, place)
    manager.save(step, tiny(step + 1))
    manager.wait()
    stop.pass_by("done")
    operations._stop = Stop(None, -1)
    manager.close()
    return stop.names


def save_gated(pipe: Connection, gate: Connection, root: str, step: int) -> None:
    """An asynchronous save that the test lets pass; its bytes are durable under a temporary name before that."""

    def make_gated(
        config: Any, ranks: Any, storage: Any, coordination: Any, *, asynchronous: bool
    ) -> AsyncCheckpointer:
        assert asynchronous
        return make_async_checkpointer(
            config,
            ranks.info,
            checkpoint_writer_init_fn=in_child.gated_writer,
            checkpoint_writer_init_args={"pipe": gate},
        )

    checkpoint_manager.make_checkpointer = make_gated  # type: ignore[assignment]
    manager = CheckpointManager(root, preemption_signals=())
    assert isinstance(manager._checkpointer, AsyncCheckpointer)
    manager.save(step, tiny(step), metrics={"loss": 0.5})
    pipe.send(process_of(manager._checkpointer))
    threading.Event().wait()


class Sampler:
    """The order of the samples of epoch after epoch, from a generator of its own."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self._order: list[int] = []

    def next(self) -> int:
        if not self._order:
            self._order = torch.randperm(7, generator=self._generator).tolist()
        return self._order.pop()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "order": list(self._order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._order = list(state["order"])


def train(root: str, steps: int, *, random_states: bool = True, seed: int = 3) -> tuple[int, list[float], bytes]:
    """Train until ``steps`` are done, saving each second one; where it began, all losses, all bits in the end."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Dropout(0.4), torch.nn.BatchNorm1d(16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    sampler = Sampler()
    data = torch.arange(42.0).reshape(7, 6) / 42
    losses: list[float] = []
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler, "losses": losses}
    with CheckpointManager(root, every_steps=2, random_states=random_states, preemption_signals=()) as manager:
        first = manager.restore(state) or 0
        for step in range(first + 1, steps + 1):
            batch = torch.stack([data[sampler.next()] for _ in range(4)])
            noise = torch.from_numpy(numpy.random.standard_normal(16)).float() * random.gauss(1, 0.1)
            loss = ((model(batch) + noise + torch.randn(16)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            manager.save_if_due(step, state)
    return first, losses, _all_bits(model, optimizer)


def _all_bits(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    tensors = list(model.state_dict().values())
    for values in optimizer.state_dict()["state"].values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
