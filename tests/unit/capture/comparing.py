"""Comparing two loaded values: bit for bit, and in everything that their parts share."""

import struct
from collections import Counter, OrderedDict
from typing import Any

import torch

from lastgood._torch_internals import untyped_storage_of

_MUTABLE = (dict, list, set, bytearray)


class Comparison:
    """Walks two values side by side; raises ``AssertionError`` naming the place where they differ."""

    def __init__(self) -> None:
        self._partners: dict[int, Any] = {}
        self._back: dict[int, Any] = {}
        self._alive: list[Any] = []
        self._views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def same(self, found: Any, expected: Any, path: str = "state") -> None:
        """Both are of one type, equal, and share their parts in the same way."""
        found, expected = _untyped(found), _untyped(expected)
        assert type(found) is type(expected), (path, type(found), type(expected))
        if isinstance(found, (*_MUTABLE, torch.Tensor)) and self._met(found, expected, path):
            return
        if isinstance(found, torch.Tensor):
            self._tensors(found, expected, path)
        elif isinstance(found, torch.UntypedStorage):
            self._storages(found, expected, path)
            assert found.tolist() == expected.tolist(), path
        elif isinstance(found, (dict, list, tuple)):
            self._containers(found, expected, path)
        elif isinstance(found, (set, frozenset)):
            assert sorted(map(_bits, found)) == sorted(map(_bits, expected)), path
        else:
            assert _bits(found) == _bits(expected), (path, found, expected)

    def _met(self, found: Any, expected: Any, path: str) -> bool:
        """Whether this pair was met before; objects that are one object here must be one object there."""
        known = id(found) in self._partners
        assert self._partners.setdefault(id(found), expected) is expected, f"{path}: one object here, not there"
        assert self._back.setdefault(id(expected), found) is found, f"{path}: one object there, not here"
        self._alive += [found, expected]
        return known

    def _containers(self, found: Any, expected: Any, path: str) -> None:
        assert len(found) == len(expected), path
        if isinstance(found, (list, tuple)):
            for number, (left, right) in enumerate(zip(found, expected, strict=True)):
                self.same(left, right, f"{path}[{number}]")
            return
        for number, (left, right) in enumerate(zip(found.items(), expected.items(), strict=True)):
            self.same(left[0], right[0], f"{path}: key {number}")
            self.same(left[1], right[1], f"{path}[{left[0]!r}]")
        if isinstance(found, (OrderedDict, Counter)):
            self.same(vars(found), vars(expected), f"{path}: attributes")

    def _tensors(self, found: torch.Tensor, expected: torch.Tensor, path: str) -> None:
        for name in ("dtype", "layout", "device", "requires_grad", "is_leaf", "is_quantized", "is_nested"):
            assert getattr(found, name) == getattr(expected, name), (path, name)
        if found.is_quantized or found.is_nested or found.layout is not torch.strided:
            self.same(_parts(found), _parts(expected), path)
            return
        assert found.shape == expected.shape, path
        assert found.stride() == expected.stride(), path
        assert found.is_conj() == expected.is_conj(), path
        assert found.is_neg() == expected.is_neg(), path
        assert torch.equal(elements(found), elements(expected)), f"{path}: other bytes"
        self.same(found.__dict__, expected.__dict__, f"{path}: attributes")
        left, right = found.untyped_storage(), expected.untyped_storage()
        self._storages(left, right, path)
        views = self._views.setdefault(id(left), [])
        if found.numel():
            views.append((found, expected))
            distances = [_first_byte(ours) - _first_byte(theirs) for ours, theirs in (views[0], views[-1])]
            assert distances[0] == distances[1], f"{path}: lies elsewhere in its storage"

    def _storages(self, found: torch.UntypedStorage, expected: torch.UntypedStorage, path: str) -> None:
        # Without a byte there is nothing to share; torch then makes a storage for each tensor when it loads.
        if found.nbytes() and expected.nbytes():
            self._met(found, expected, f"{path}: storage")

    def write_through(self) -> None:
        """Change both values in the same way, through one tensor of each storage; compare again afterwards."""
        for views in self._views.values():
            for tensor in views[0] if views else ():
                used_bytes(tensor).bitwise_xor_(0x55)


def _parts(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor that is more than a view of one storage is made of."""
    if tensor.is_nested:
        if tensor.layout is torch.jagged:
            return {"values": tensor.values(), "offsets": tensor.offsets()}
        return {"parts": list(tensor.unbind())}
    parts: dict[str, Any] = {"shape": tensor.shape}
    if tensor.layout is torch.sparse_coo:
        names = ["is_coalesced", "indices", "values"]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        names = ["crow_indices", "col_indices", "values"]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        names = ["ccol_indices", "row_indices", "values"]
    else:
        parts["scheme"] = str(tensor.qscheme())
        names = ["stride", "int_repr"]
        if "channel" in parts["scheme"]:
            names += ["q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"]
        else:
            names += ["q_scale", "q_zero_point"]
    return parts | {name: getattr(tensor, name)() for name in names}


def assert_same(found: Any, expected: Any) -> None:
    """The values are equal bit for bit, share alike, and still do so after writing through the tensors."""
    comparison = Comparison()
    comparison.same(found, expected)
    comparison.write_through()
    Comparison().same(found, expected, "state, written through")
    comparison.write_through()  # the same change once more takes it back


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as they lie in memory, one row of bytes each, whatever the conjugate and negative bits say."""
    size = tensor.element_size()
    strides = (*(step * size for step in tensor.stride()), 1)
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    return raw_bytes(tensor).as_strided((*tensor.shape, size), strides, _first_byte(tensor))


def used_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes from the first to the last used one."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = _first_byte(tensor)
    return raw_bytes(tensor)[start : start + span * tensor.element_size()]


def _untyped(value: Any) -> Any:
    # torch.load brings an UntypedStorage back as a TypedStorage of bytes.
    storage = untyped_storage_of(value)
    return value if storage is None else storage


def _first_byte(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _bits(value: Any) -> Any:
    """Something that is equal only for values of the same type and the same bits."""
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, complex):
        return "complex", struct.pack(">dd", value.real, value.imag)
    if isinstance(value, tuple):
        return "tuple", tuple(map(_bits, value))
    return type(value).__name__, repr(value)
