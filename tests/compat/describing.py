"""Values as JSON, so that they can be compared with what was noted of them years ago; without torch and NumPy.

Whatever holds others, and every tensor, is numbered in the order in which it is met: what stands in several places
comes as ``{"same": number}`` from the second time on.
"""

import ast
import hashlib
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

DEEPEST = 100
"""Containers that stand deeper than this are opaque to the format."""


def describe_scalar(value: Any) -> str | None:
    """Equal for equal values of one type, to the bit; ``None`` for what is no scalar."""
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return f"{kind.__name__} {value}"
    if kind is float:
        return f"float {value!r}" if math.isfinite(value) else f"float with the bits {struct.pack('>d', value).hex()}"
    if kind is complex:
        return f"complex with the bits {struct.pack('>dd', value.real, value.imag).hex()}"
    if kind is str:
        return f"str {value!a}"
    return f"bytes {value.hex()}" if kind is bytes else None


class Describer:
    """Describes one value. Subclasses know tensors of one library, and what else comes with it."""

    tensor_class: type

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._on_memory: dict[Any, tuple[int, int]] = {}

    def describe(self, value: Any, depth: int = 0) -> Any:
        """What ``json`` takes."""
        scalar = describe_scalar(value)
        if scalar is not None:
            return scalar
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple, set, bytearray) and depth >= DEEPEST:
            return {"opaque": f"builtins.{kind.__name__}", "is": type(self)().describe(value)}
        if kind is tuple:
            return {"tuple": [self.describe(item, depth + 1) for item in value]}
        if kind not in (dict, OrderedDict, list, set, bytearray) and not self.is_plain_tensor(value):
            return self.describe_other(value)
        if id(value) in self._numbers:
            return {"same": self._numbers[id(value)]}
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return self.describe_tensor(value) if self.is_plain_tensor(value) else self._container(value, depth)

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value).__name__
        if isinstance(value, bytearray):
            return {kind: value.hex()}
        if isinstance(value, dict):
            pairs = [[self.describe(key, depth + 1), self.describe(item, depth + 1)] for key, item in value.items()]
            if not isinstance(value, OrderedDict):
                return {kind: pairs}
            attributes = {name: self.describe(item, depth + 1) for name, item in vars(value).items()}
            return {kind: pairs, "attributes": attributes}
        items = [self.describe(item, depth + 1) for item in value]
        return {kind: sorted(items, key=json.dumps) if isinstance(value, set) else items}

    def on_memory(self, memory: Any, address: int) -> list[int]:
        """Which numbered tensor first stood on this memory, and how many bytes after its first one this one begins."""
        number, first = self._on_memory.setdefault(memory, (len(self._numbers) - 1, address))
        return [number, address - first]

    def is_plain_tensor(self, value: Any) -> bool:
        """Whether it is a tensor that the format describes by itself."""
        return isinstance(value, self.tensor_class)

    def describe_tensor(self, tensor: Any) -> Any:
        """Dtype, shape, and the SHA-256 of its elements in row-major order; and more, if it is known."""
        raise NotImplementedError

    def describe_other(self, value: Any) -> Any:
        """What is no scalar, container or plain tensor."""
        raise TypeError(f"a {type(value).__name__}")


def digest(data: bytes) -> str:
    """The SHA-256 of the elements of a tensor."""
    return hashlib.sha256(data).hexdigest()


def values_of(description: Any) -> Any:
    """A description without what does not belong to the values: strides, flags, which memory is shared."""
    return _changed(
        description, lambda found: {name: found[name] for name in ("tensor", "shape", "sha256")}, lambda _: None
    )


def without_torch(description: Any) -> Any:
    """The description of what a reader makes of it that has NumPy alone.

    Which memory is shared is left out of tensors that it has to compute.
    """
    names = {"size": "tuple", "device": "tuple"}

    def tensor(found: Any) -> Any:
        keeps_memory = "memory" in found and not {"c", "n"} & set(found.get("flags", ""))
        return {name: found[name] for name in ("tensor", "shape", "sha256", *(["memory"] if keeps_memory else []))}

    def other(found: Any) -> Any:
        (kind, content), *_ = found.items()
        if kind == "opaque":
            return {kind: content}
        if kind == "dtype":
            return describe_scalar(f"torch.{content}")
        return {"tuple": list(map(describe_scalar, content))} if kind in names else None

    return _changed(description, tensor, other)


def _changed(description: Any, tensor: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """With something else in the place of each tensor, and of those other values of which ``other`` makes something."""
    if isinstance(description, list):
        return [_changed(item, tensor, other) for item in description]
    if not isinstance(description, dict):
        return description
    if "sha256" in description:
        return tensor(description)
    replaced = other(description) if description else None
    if replaced is not None:
        return replaced
    return {name: _changed(item, tensor, other) for name, item in description.items()}


def tensors_in(description: Any) -> Iterator[tuple[str, Any]]:
    """The descriptions of all tensors by key path, under all keys at which they stand; not of those that are opaque."""
    return _tensors_in(description, "", [])


def _tensors_in(description: Any, path: str, numbered: list[Any]) -> Iterator[tuple[str, Any]]:
    if not isinstance(description, dict) or "opaque" in description:
        return
    if "same" in description:
        if "tensor" in numbered[description["same"]]:
            yield path, numbered[description["same"]]
        return
    (kind, content), *_ = description.items()
    if kind not in ("tuple", "size", "dtype", "device"):
        numbered.append(description)
    if kind == "tensor":
        yield path, description
    elif kind in ("list", "tuple"):
        for number, item in enumerate(content):
            yield from _tensors_in(item, f"{path}[{number}]", numbered)
    elif kind in ("dict", "OrderedDict"):
        named = [(_shown(key), item) for key, item in content] + [*description.get("attributes", {}).items()]
        for name, item in named:
            yield from _tensors_in(item, f"{path}.{name}" if path else name, numbered)


def _shown(key: Any) -> str:
    """A key as it stands in key paths; keys that no path shows are above no tensor of the fixtures."""
    kind, _, shown = key.partition(" ") if isinstance(key, str) else ("", "", str(key))
    return str(ast.literal_eval(shown)) if kind == "str" else shown
