"""A training that goes on where it was stopped. Run it, press Ctrl-C or kill it, and run it again.

Three lines are about checkpoints; they are marked. They are written in the background, by a process that finishes what
it has been given when the training ends, however it ends.
"""

import sys

import torch

import lastgood

root = sys.argv[1] if len(sys.argv) > 1 else "my-run"
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
state = {"model": model, "optimizer": optimizer}

with lastgood.CheckpointManager(root, every_steps=100, keep=lastgood.KeepLast(3)) as manager:  # 1
    start = manager.restore(state)  # 2: the newest good one, verified; those that are damaged are passed over
    print("starting afresh" if start is None else f"resumed at step {start}")

    for step in range((start or 0) + 1, 1001):
        inputs = torch.randn(64, 16)
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        manager.save_if_due(step, state)  # 3: of this moment; old ones go once a newer one is durable
        if step % 100 == 0:
            print(f"step {step}, loss {loss.item():.4f}")
