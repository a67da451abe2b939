"""A state with everything whose order Python leaves open; as a program, saves it to the path given."""

import sys
from collections import Counter, OrderedDict
from typing import Any

import torch

import lastgood

NAMES = [f"name {number}" for number in range(20)]


def a_state() -> dict[str, Any]:
    """The same state every time, made anew."""
    memory = torch.arange(40_000, dtype=torch.float32)
    special = memory[:5].clone()
    special.note = {"kept": [1, 2]}  # type: ignore[attr-defined]
    return {
        "names": set(NAMES),
        "pairs": {(name, number, (name[-1],)) for number, name in enumerate(NAMES)},
        "mixed": {1, "1", 1.5, None, b"1", 2**80, (), 1j, float("inf")},
        "counts": Counter(NAMES),
        "views": [memory[100:], memory[:200].reshape(10, 20).t(), special],
        "module": OrderedDict(weight=torch.nn.Parameter(torch.ones(3)), tied=memory),
        7: (torch.float16, torch.Size([1, 2])),
    }


if __name__ == "__main__":
    print(list(set(NAMES)))
    lastgood.save(a_state(), sys.argv[1])
