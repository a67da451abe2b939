"""Saving and loading real files, and listening to what is said on the way."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config

import lastgood
from lastgood.errors import UnsafeValueWarning


def save_and_listen(state: Any, path: Path) -> list[str]:
    """Save by lastgood; the warnings about values that a safe load will refuse."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", UnsafeValueWarning)
        lastgood.save(state, path)
    return [str(warning.message) for warning in caught]


def is_safe(path: Path) -> bool:
    """Whether torch loads the file without running code from it."""
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def loaded_by_torch(path: Path, *, safe: bool) -> Iterator[Any]:
    """What is in the file, by every way in which torch finds its records."""
    for mmap in (False, True):
        for calculated in (False, True):
            with config.patch({"load.calculate_storage_offsets": calculated}):
                yield torch.load(path, weights_only=safe, mmap=mmap)


def loaded_by_us(path: Path) -> Iterator[Any]:
    """What is in the file, read and mapped."""
    yield lastgood.load(path)
    yield lastgood.load(path, mmap=True)
