"""The ways to save that are compared. When one returns, the files that it names are durable."""

import os
from collections.abc import Callable

import torch
from states import State

import lastgood

Save = Callable[[State, str], list[str]]
"""Saves a state under a path without suffix, and returns the files that it made."""


def save_with_lastgood(state: State, base: str) -> list[str]:
    """Durable, atomic and with checksums by itself."""
    path = base + ".pt"
    lastgood.save(state.tree, path)
    return [path]


def save_with_torch(state: State, base: str) -> list[str]:
    """``torch.save``, then fsync of the file and its directory."""
    path = base + ".pt"
    torch.save(state.tree, path)
    fsync(path)
    fsync(os.path.dirname(path))
    return [path]


def save_with_safetensors(state: State, base: str) -> list[str]:
    """The tensors alone, then fsync of the file and its directory."""
    from safetensors.torch import save_file

    path = base + ".safetensors"
    save_file(state.flat, path)
    fsync(path)
    fsync(os.path.dirname(path))
    return [path]


def save_with_fastsafetensors(state: State, base: str) -> list[str]:
    """The tensors alone, in 16 files as it does by default; fsyncs files and directory when asked to."""
    from fastsafetensors import ParallelSaver

    return list(ParallelSaver(fsync=True).save(state.flat, base))


def fsync(path: str) -> None:
    """Of a file, or of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LASTGOOD = "lastgood.save"
TORCH = "torch.save + fsync"
SAFETENSORS = "safetensors save_file + fsync"
FASTSAFETENSORS = "fastsafetensors ParallelSaver(fsync=True)"

SAVERS: dict[str, Save] = {
    LASTGOOD: save_with_lastgood,
    TORCH: save_with_torch,
    SAFETENSORS: save_with_safetensors,
    FASTSAFETENSORS: save_with_fastsafetensors,
}


def remove(paths: list[str]) -> None:
    """Delete what a saver has made, and forget it."""
    while paths:
        os.unlink(paths.pop())
