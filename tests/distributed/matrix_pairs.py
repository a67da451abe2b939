"""Which pairs of a save and a load the matrix tries: few that meet every two of its values together, or all."""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

WORLD_SIZES: dict[str, tuple[int, ...]] = {
    "plain": (1,),
    "ddp": (2, 3, 4, 8),
    "fsdp": (1, 2, 3, 4, 8),
    "tp": (2, 3, 4, 8),
    "fsdp-tp": (4, 8),
    "hsdp": (4, 8),
}
"""The layouts, and the numbers of ranks that each is tried with."""

FEW_PAIRS = 40
"""So many at most fit into ``make test``."""

_SEED = 0


class Pair(NamedTuple):
    """A save in one layout, and a load in another one."""

    saved: str
    saved_ranks: int
    loaded: str
    loaded_ranks: int
    asynchronous: bool

    def __str__(self) -> str:
        how = "async" if self.asynchronous else "sync"
        return f"{self.saved}-{self.saved_ranks}-{how}-to-{self.loaded}-{self.loaded_ranks}"


class Together(NamedTuple):
    """Two values that a pair has at two of its fields."""

    first: int
    first_value: object
    second: int
    second_value: object


def all_pairs() -> list[Pair]:
    """Every one that can be."""
    layouts = [(layout, ranks) for layout, sizes in WORLD_SIZES.items() for ranks in sizes]
    return [
        Pair(*saved, *loaded, asynchronous)
        for saved, loaded, asynchronous in itertools.product(layouts, layouts, (False, True))
    ]


def is_quick(pair: Pair) -> bool:
    """Eight checkpoint processes that import torch, and three, are left to ``make crash``."""
    return not (pair.asynchronous and pair.saved_ranks in (3, 8))


def few_pairs() -> list[Pair]:
    """Quick ones in which every two values meet that meet in any quick one; the same ones at every call."""
    return _cover([pair for pair in all_pairs() if is_quick(pair)], random.Random(_SEED))


def _cover(candidates: Sequence[Pair], random_choice: random.Random) -> list[Pair]:
    """Take the pair that adds most, until nothing is left to add; chance decides between equals."""
    order = random_choice.sample(candidates, len(candidates))
    open_pairs = set().union(*map(together, candidates))
    chosen: list[Pair] = []
    while open_pairs:
        best = max(order, key=lambda pair: len(open_pairs.intersection(together(pair))))
        open_pairs -= set(together(best))
        chosen.append(best)
    return chosen


def together(pair: Pair) -> list[Together]:
    """The twos of values that meet in a pair."""
    return [Together(*first, *second) for first, second in itertools.combinations(enumerate(pair), 2)]


def by_groups(pairs: Sequence[Pair]) -> list[Pair]:
    """In an order in which the ranks that load join few process groups."""
    return sorted(pairs, key=lambda pair: (pair.loaded != "plain", pair.loaded_ranks, pair))
