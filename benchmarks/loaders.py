"""The ways to load that are compared: whole, into new tensors, into existing ones, or as a lazy mapping."""

from collections.abc import Callable
from typing import Any

import savers
import torch
from states import State

import lastgood

Load = Callable[[list[str]], Any]
"""Loads the files that a saver has made into new memory; the result has the state's structure, or its flat one."""

LoadInto = Callable[[list[str], State], Any]
"""Loads into the tensors of a state; returns what it has loaded into."""


def load_with_lastgood(paths: list[str]) -> Any:
    """Every byte of the file is checked."""
    return lastgood.load(paths[0])


def load_with_torch(paths: list[str]) -> Any:
    """Nothing is checked."""
    return torch.load(paths[0], weights_only=True)


def load_with_safetensors(paths: list[str]) -> Any:
    """Read into memory; nothing is checked."""
    from safetensors.torch import load_file

    return load_file(paths[0], backend="pread")


def load_with_safetensors_touched(paths: list[str]) -> Any:
    """Mapped, and every page touched: the data is in memory, but shared with the page cache."""
    tensors = map_with_safetensors(paths)
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8)[::4096].sum()
    return tensors


def load_with_fastsafetensors(paths: list[str]) -> Any:
    """Read into one buffer, past the page cache; the tensors are views of it. Nothing is checked."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
    loader.add_filenames({0: paths})
    buffer = loader.copy_files_to_device()
    tensors = {name: buffer.get_tensor(name) for name in loader.get_keys()}
    buffer.close()
    loader.close()
    return tensors


def load_into_with_lastgood(paths: list[str], target: State) -> Any:
    """Everything that is read is checked."""
    return lastgood.load(paths[0], target.tree)


def load_into_with_torch(paths: list[str], target: State) -> Any:
    """Mapped, then copied, as ``load_state_dict`` does."""
    loaded = State.of(torch.load(paths[0], mmap=True, weights_only=True))
    with torch.no_grad():
        for name, tensor in target.flat.items():
            tensor.copy_(loaded.flat[name])
    return target.flat


def load_into_with_safetensors(paths: list[str], target: State) -> Any:
    """Mapped, then copied."""
    from safetensors import safe_open

    with safe_open(paths[0], framework="pt") as file, torch.no_grad():
        for name, tensor in target.flat.items():
            tensor.copy_(file.get_tensor(name))
    return target.flat


def map_with_lastgood(paths: list[str]) -> Any:
    """Reads and checks the index alone."""
    return lastgood.load(paths[0], mmap=True)


def map_with_torch(paths: list[str]) -> Any:
    """Reads the pickle and the places of the records."""
    return torch.load(paths[0], mmap=True, weights_only=True)


def map_with_safetensors(paths: list[str]) -> Any:
    """Reads the header."""
    from safetensors.torch import load_file

    return load_file(paths[0])


LASTGOOD = "lastgood.load"
TORCH = "torch.load"
SAFETENSORS = "safetensors load_file(backend='pread')"
SAFETENSORS_TOUCHED = "safetensors load_file, pages touched"
FASTSAFETENSORS = "fastsafetensors SafeTensorsFileLoader"
LASTGOOD_INTO = "lastgood.load into targets"
TORCH_INTO = "torch.load(mmap=True) + copy"
SAFETENSORS_INTO = "safetensors safe_open + copy"
LASTGOOD_MAP = "lastgood.load(mmap=True)"
TORCH_MAP = "torch.load(mmap=True)"
SAFETENSORS_MAP = "safetensors load_file"

FRESH: dict[str, tuple[Load, str]] = {
    LASTGOOD: (load_with_lastgood, savers.LASTGOOD),
    TORCH: (load_with_torch, savers.TORCH),
    SAFETENSORS: (load_with_safetensors, savers.SAFETENSORS),
    SAFETENSORS_TOUCHED: (load_with_safetensors_touched, savers.SAFETENSORS),
    FASTSAFETENSORS: (load_with_fastsafetensors, savers.FASTSAFETENSORS),
}
INTO: dict[str, tuple[LoadInto, str]] = {
    LASTGOOD_INTO: (load_into_with_lastgood, savers.LASTGOOD),
    TORCH_INTO: (load_into_with_torch, savers.TORCH),
    SAFETENSORS_INTO: (load_into_with_safetensors, savers.SAFETENSORS),
}
MAPPED: dict[str, tuple[Load, str]] = {
    LASTGOOD_MAP: (map_with_lastgood, savers.LASTGOOD),
    TORCH_MAP: (map_with_torch, savers.TORCH),
    SAFETENSORS_MAP: (map_with_safetensors, savers.SAFETENSORS),
}
"""By name: how to load, and which saver's files."""
