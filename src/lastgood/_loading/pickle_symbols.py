"""What stands for the values of a pickle while its opcodes are followed without making the values.

``None``, bools, ints, floats and strs stand for themselves.
"""

from collections.abc import Sequence
from typing import Any


class GlobalSymbol:
    """A name that the pickle looks up, as ``module.name``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class StorageSymbol:
    """A storage that the file holds; ``element_bits`` is the size of its elements as tensors count them."""

    __slots__ = ("element_bits", "nbytes")

    def __init__(self, nbytes: int, element_bits: int) -> None:
        self.nbytes = nbytes
        self.element_bits = element_bits


class TensorSymbol:
    """A tensor of ``nbytes`` bytes in elements; ``wide`` if that is more than its storage has (it repeats some)."""

    __slots__ = ("nbytes", "wide")

    def __init__(self, nbytes: int, *, wide: bool) -> None:
        self.nbytes = nbytes
        self.wide = wide


class TupleSymbol:
    """A tuple. ``weight`` counts all that one walk through it visits, ``depth`` the tuples inside each other."""

    __slots__ = ("depth", "items", "weight")

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = tuple(items)
        self.weight = 1 + len(self.items)
        self.depth = 1
        for item in self.items:
            if type(item) is TupleSymbol:
                self.weight += item.weight
                self.depth = max(self.depth, 1 + item.depth)


class ListSymbol:
    """A list."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Any] = []


class DictSymbol:
    """A dict: its keys and values in turn. ``has_state`` if its objects have attributes (OrderedDict, Counter)."""

    __slots__ = ("has_state", "items")

    def __init__(self, *, has_state: bool) -> None:
        self.has_state = has_state
        self.items: list[Any] = []


class BytesSymbol:
    """A bytes value."""

    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


PLAIN = object()
"""A value of a kind that nothing is made of: a set, a device, a dtype's bytes."""


class UsersSymbol:
    """A value made by something that is none of torch's: a user has to allow it. ``name`` is what is called."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


USERS = UsersSymbol("")
"""A value made by something that the user has allowed."""


def is_count(value: Any) -> bool:
    """Whether it is an int that can be a size, a stride or an offset."""
    return type(value) is int and 0 <= value < 2**63
