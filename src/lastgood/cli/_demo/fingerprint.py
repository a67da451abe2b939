"""Equal to the last bit, or not: states compared by the bytes of their tensors."""

import ctypes
import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def fingerprint(state: Any) -> str:
    """The SHA-256 of a nested state: of every tensor's dtype, shape and bytes, and of every other value's ``repr``.

    Dictionaries count in the order of their keys as text, so two states with equal content have equal fingerprints.
    """
    digest = hashlib.sha256()
    for path, content in _leaves(state, ""):
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def differences(one: Any, other: Any) -> list[str]:
    """The dotted paths at which two states are not the same, bit for bit."""
    ones, others = dict(_leaves(one, "")), dict(_leaves(other, ""))
    return sorted(path for path in ones.keys() | others.keys() if ones.get(path) != others.get(path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, dict):
        yield path, f"dict of {len(value)}".encode()
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield path, f"{type(value).__name__} of {len(value)}".encode()
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}" if path else str(index))
    elif isinstance(value, Tensor):
        yield path, f"{value.dtype} {tuple(value.shape)} ".encode() + _bytes_of(value)
    else:
        yield path, repr(value).encode()


def _bytes_of(tensor: Tensor) -> bytes:
    dense = tensor.detach().cpu().contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size()) if dense.numel() else b""
