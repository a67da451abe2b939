"""A training with FSDP2 that goes on with another number of processes than it was stopped with.

    torchrun --nproc-per-node=4 examples/train_fsdp.py my-run      # press Ctrl-C, or kill it
    torchrun --nproc-per-node=2 examples/train_fsdp.py my-run      # goes on at the last checkpoint

Each process writes its shards, and all commit together; each reads just what its new shards need.
"""

import sys

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard

import lastgood

root = sys.argv[1] if len(sys.argv) > 1 else "my-run"
torch.distributed.init_process_group("gloo")
rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
state = {"model": model, "optimizer": optimizer}

with lastgood.CheckpointManager(root, every_steps=100, keep=lastgood.KeepLast(3)) as manager:
    start = manager.restore(state)
    if rank == 0:
        where = "starting afresh" if start is None else f"resumed at step {start}"
        print(f"{where} with {world_size} processes")

    for step in range((start or 0) + 1, 1001):
        # The same 240 samples for every number of processes; each takes its share of them.
        everything = torch.randn(240, 64, generator=torch.Generator().manual_seed(step))
        inputs = everything.chunk(world_size)[rank]
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        manager.save_if_due(step, state)
        if rank == 0 and step % 100 == 0:
            print(f"step {step}, loss {loss.item():.4f}")

torch.distributed.destroy_process_group()
