"""The demo's GPT under FSDP2, started by torchrun: ``fsdp_training.py ROOT STEPS SAVE_EVERY``.

Whatever the number of ranks, every step learns from the same global batch: what differs are orders of summation. Rank 0
reports as lines of JSON.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lastgood import CheckpointManager
from lastgood.cli._demo.batches import Batches
from lastgood.cli._demo.corpus import read_corpus
from lastgood.cli._demo.fingerprint import fingerprint
from lastgood.cli._demo.model import GPT
from lastgood.cli._demo.protocol import ModelShape

SHAPE = ModelShape(layers=2, width=24, heads=2, context=16)
GLOBAL_BATCH = 12  # of 1, 2, 3 and 4 ranks equal shares


def new_model() -> GPT:
    torch.manual_seed(11)
    model = GPT(SHAPE)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each rank would draw others
    return model


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def new_batches() -> Batches:
    return Batches(read_corpus()[:40_000], size=GLOBAL_BATCH, length=SHAPE.context, seed=5)


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def whole(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def report(**what: Any) -> None:
    if torch.distributed.get_rank() == 0:
        print(json.dumps(what), flush=True)


def train(root: str, steps: int, save_every: int) -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = new_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer, batches = new_optimizer(model), new_batches()
    state = {"model": model, "optimizer": optimizer, "batches": batches}
    with CheckpointManager(root, every_steps=save_every, on_failure="raise") as manager:
        start = manager.restore(state) or 0
        report(resumed=start, world_size=world_size, weights=fingerprint(whole(model.state_dict())))
        for step in range(start + 1, steps + 1):
            inputs, targets = (part.chunk(world_size)[rank] for part in batches.next_batch())
            loss = loss_of(model, inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            report(step=step, loss=mean.item() / world_size)
            if manager.is_due(step):
                weights = fingerprint(whole(model.state_dict()))
                manager.save(step, state).result(120)
                report(saved=step, weights=weights)
    report(finished=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    torch.distributed.destroy_process_group()
