"""Tensors of a state dict that are in shared memory already: the checkpoint process gets that very memory.

Only for what is written by a writer of the user's own. torch is never imported from here: where it is not loaded,
there are no tensors.
"""

import sys
from typing import Any

KeyPath = tuple[Any, ...]


def find_shared_tensors(state_dict: dict[str, Any]) -> dict[KeyPath, Any]:
    """The plain CPU tensors in shared memory under nested dicts and lists, by their keys."""
    torch = sys.modules.get("torch")
    found: dict[KeyPath, Any] = {}
    if torch is None:
        return found
    seen: set[int] = set()
    # A stack of its own: nesting may be deeper than Python's.
    pending: list[tuple[KeyPath, Any]] = [((), state_dict)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, (dict, list)):
            if id(value) not in seen:
                seen.add(id(value))
                entries = value.items() if isinstance(value, dict) else enumerate(value)
                pending.extend(((*path, key), entry) for key, entry in entries)
        elif type(value) in (torch.Tensor, torch.nn.Parameter) and _is_shared(value, torch):
            found[path] = value.detach()
    return found


def _is_shared(tensor: Any, torch: Any) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and bool(tensor.is_shared())


def put_shared_tensors(state_dict: dict[str, Any], tensors: dict[KeyPath, Any]) -> None:
    """Put them where they were found, in a state dict of the same structure."""
    for path, tensor in tensors.items():
        container: Any = state_dict
        for key in path[:-1]:
            container = container[key]
        container[path[-1]] = tensor
