"""A training that goes on where it was stopped. Run it, press Ctrl-C or kill it, and run it again.

Three lines are about checkpoints; they are marked. They are written in the background, by a process that finishes what
it has been given when the training ends, however it ends.
"""

import sys

import torch

import lastgood

path = sys.argv[1] if len(sys.argv) > 1 else "my-checkpoint"
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
step = 0

checkpointer = lastgood.make_async_checkpointer()  # 1
try:
    state = checkpointer.load(path)  # 2: verified, or an error that says what is damaged
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step = state["step"]
    print(f"resumed at step {step}")
except lastgood.CheckpointNotFoundError:
    print("starting afresh")

while step < 1000:
    inputs = torch.randn(64, 16)
    loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if step % 100 == 0:
        print(f"step {step}, loss {loss.item():.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        checkpointer.save(path, state)  # 3: of this moment, and the one before is there until it is durable
