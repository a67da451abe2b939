"""A training script as users write them: ``python script.py DIRECTORY ENDING``. It never waits for its last save.

Its checkpointer is a local variable, gone when the interpreter ends.
"""

import os
import sys

import torch

from lastgood.builder import make_async_checkpointer


def main(directory: str, ending: str) -> None:
    checkpointer = make_async_checkpointer()
    weights = torch.zeros(2_000_000)
    for step in (1, 2):
        weights += 1
        parent = directory
        if ending == "fails" and step == 2:
            parent = f"{directory}/file"
            with open(parent, "x"):
                pass  # it stands in the way of the last checkpoint
        staged, _ = checkpointer.save(f"{parent}/step-{step}", {"weights": weights, "step": step})
        staged.result(60)
    weights += 1
    if ending == "sys.exit":
        sys.exit(7)
    if ending == "exception":
        raise LookupError("the user's own fault")
    if ending == "fork":
        # What os.fork() is for: the copy has to leave the checkpointer to the one who made it.
        copy = os.fork()
        if copy == 0:
            sys.exit(0)
        os.waitpid(copy, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
