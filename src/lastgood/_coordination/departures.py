"""Ranks whose trainer has ended: no save waits for the vote of one."""

from collections.abc import Sequence
from typing import Any

_ANY = "departed"


def say_departed(store: Any, rank: int) -> None:
    """All that this rank has been asked to save is saved, and nobody is left to ask for more."""
    store.set(f"{_ANY}/{rank}", "1")
    store.set(_ANY, "1")


def has_any_departed(store: Any) -> bool:
    """Whether it is worth asking who."""
    return bool(store.check([_ANY]))


def departed_of(store: Any, ranks: Sequence[int]) -> tuple[int, ...]:
    """Those of ``ranks`` that have said so."""
    return tuple(rank for rank in ranks if store.check([f"{_ANY}/{rank}"]))
