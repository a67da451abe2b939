"""How long the command takes to answer about a checkpoint of very many tensors."""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from report import AtMost, Section
from states import small_tensors_state
from timing import Contender, measure_in_turns

import lastgood

WITHOUT_TORCH_SECS = 1.0
BEYOND_TORCH_SECS = 2.0
_IMPORT = "python -c 'import torch'"


def measure_command(directory: str, tensors: int, rounds: int) -> Section:
    """Each verb, in a process of its own, on a run with two checkpoints of so many tensors."""
    root = os.path.join(directory, "run")
    state = small_tensors_state(tensors)
    with lastgood.CheckpointManager(root, asynchronous=False) as manager:
        for step in (1, 2):
            manager.save(step, state.tree)
    first, second = (os.path.join(root, f"step-{step}") for step in (1, 2))
    key = next(iter(state.flat))
    without_torch = {
        "lastgood ls ROOT": ["ls", root],
        "lastgood inspect PATH": ["inspect", second],
        "lastgood verify PATH": ["verify", second],
        "lastgood prune ROOT": ["prune", root, "--keep", "last=1"],
        "lastgood doctor ROOT": ["doctor", root],
    }
    with_torch = {"lastgood cat PATH KEY": ["cat", second, key], "lastgood diff A B": ["diff", first, second]}
    command = os.path.join(os.path.dirname(sys.executable), "lastgood")
    contenders = [Contender(_IMPORT, partial(_run, [sys.executable, "-c", "import torch"]))]
    contenders += [
        Contender(name, partial(_run, [command, *arguments]), required=True)
        for name, arguments in {**without_torch, **with_torch}.items()
    ]
    results, left_out = measure_in_turns("command", contenders, rounds, touched_bytes=0)
    limit = statistics.median(results[_IMPORT].seconds) + BEYOND_TORCH_SECS
    aims = [AtMost(name, WITHOUT_TORCH_SECS) for name in without_torch] + [AtMost(name, limit) for name in with_torch]
    title = f"the command on two checkpoints of {tensors:,} tensors"
    return Section("command", title, state.nbytes, results, (), moves_data=False, left_out=left_out, at_most=aims)


def _run(arguments: Sequence[str]) -> None:
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
