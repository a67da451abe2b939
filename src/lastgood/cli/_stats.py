"""What the elements of tensors look like: smallest, largest, mean, spread, and how many are no numbers. Needs torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from lastgood.cli._measure import flat, per_segment, per_tensor, row_of, wide
from lastgood.cli._tensors import BATCH_ELEMENTS, SavedTensor, Source, batches, boxes, by_dtype
from lastgood.format.mesh import whole

if TYPE_CHECKING:
    import torch

_PIECE_ELEMENTS = 1024 * 1024


class Stats(msgspec.Struct, gc=False):
    """Of one tensor; NaN and infinite elements are counted and left out of all else. Of complex ones, magnitudes.

    ``std`` is that of all elements (divided by their number). All but the counts are ``None`` where no element is
    finite.
    """

    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    nan: int = 0
    inf: int = 0


def stats_of(source: Source, nodes: Sequence[SavedTensor]) -> list[Stats]:
    """The statistics of each tensor, read in bounded pieces."""
    seen = [_Seen() for _ in nodes]
    counts = [math.prod(node.shape) for node in nodes]
    for numbers in batches(counts, BATCH_ELEMENTS):
        first = numbers[0]
        if counts[first] > _PIECE_ELEMENTS:
            for box in boxes(whole(nodes[first].shape), _PIECE_ELEMENTS):
                seen[first].add(_look_at(flat(source.read_part(nodes[first], box)), [box.element_count])[0])
            continue
        data = source.read_bytes([nodes[number] for number in numbers])
        for dtype, group in by_dtype([nodes[number] for number in numbers]).items():
            found = _look_at(
                row_of([data[place] for place in group], dtype), [counts[first + place] for place in group]
            )
            for place, one in zip(group, found, strict=True):
                seen[first + place] = one
    return [one.stats() for one in seen]


class _Seen(msgspec.Struct, gc=False):
    """What is known of the elements seen so far. ``squares``: of how far each finite one is from their mean, summed."""

    finite: int = 0
    nan: int = 0
    inf: int = 0
    min: float = math.inf
    max: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0

    def add(self, other: "_Seen") -> None:
        """Join what was seen of other elements of the same tensor, without losing digits."""
        self.nan += other.nan
        self.inf += other.inf
        if other.finite == 0:
            return
        total = self.finite + other.finite
        apart = other.mean - self.mean
        self.squares += other.squares + apart**2 * self.finite * other.finite / total
        self.mean += apart * other.finite / total
        self.finite = total
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def stats(self) -> Stats:
        if self.finite == 0:
            return Stats(nan=self.nan, inf=self.inf)
        return Stats(self.min, self.max, self.mean, math.sqrt(self.squares / self.finite), self.nan, self.inf)


def _look_at(row: "torch.Tensor", lengths: Sequence[int]) -> list[_Seen]:
    """What there is to see of tensors whose elements stand in one row; ``lengths`` says how many belong to each."""
    import torch

    values, segments = wide(row), torch.tensor(lengths)
    if values.is_complex():
        values = values.abs()
    others = ~values.isfinite()
    finite = per_segment(~others, segments, "sum")
    mean = per_segment(values.masked_fill(others, 0), segments, "sum") / finite
    # Which tensor each element belongs to; torch starts threads for repeat_interleave and for a tensor as an index.
    owner = torch.zeros(len(values), dtype=torch.int64).index_fill_(0, segments.cumsum(0)[:-1], 1).cumsum(0)
    apart = (values - mean.index_select(0, owner)).masked_fill(others, 0)
    counts = [map(int, per_tensor(column, segments, "sum")) for column in (~others, values.isnan(), values.isinf())]
    smallest = per_tensor(values.masked_fill(others, math.inf), segments, "min")
    largest = per_tensor(values.masked_fill(others, -math.inf), segments, "max")
    return list(map(_Seen, *counts, smallest, largest, mean.tolist(), per_tensor(apart * apart, segments, "sum")))
