"""What the elements of tensors look like: smallest, largest, mean, spread, and how many are no numbers. Needs torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lastgood.cli._tensors import TensorSource, pieces
from lastgood.format.index import TensorNode

if TYPE_CHECKING:
    import torch

_PIECE_ELEMENTS = 1024 * 1024


@dataclass(slots=True)
class Stats:
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


def stats_of(source: TensorSource, nodes: list[TensorNode]) -> list[Stats]:
    """The statistics of each tensor, read in bounded pieces."""
    found, batch, elements = [], list[TensorNode](), 0
    for node in nodes:
        count = math.prod(node.shape)
        if count > _PIECE_ELEMENTS:
            found += _of_small(source, batch)
            batch, elements = [], 0
            gathered = _Gathered()
            for part in pieces(node, _PIECE_ELEMENTS):
                gathered.add(source.read([part])[0])
            found.append(gathered.stats())
            continue
        if elements + count > _PIECE_ELEMENTS:
            found += _of_small(source, batch)
            batch, elements = [], 0
        batch.append(node)
        elements += count
    return found + _of_small(source, batch)


def _of_small(source: TensorSource, nodes: list[TensorNode]) -> list[Stats]:
    found = []
    for tensor in source.read(nodes):
        gathered = _Gathered()
        gathered.add(tensor)
        found.append(gathered.stats())
    return found


class _Gathered:
    """Count, mean and squares of what has been seen, joined piece by piece without losing digits."""

    def __init__(self) -> None:
        self._count = self._nan = self._inf = 0
        self._min, self._max, self._mean, self._squares = math.inf, -math.inf, 0.0, 0.0

    def add(self, tensor: "torch.Tensor") -> None:
        from lastgood.cli._measure import wide

        values = wide(tensor)
        if values.is_complex():
            values = values.abs()
        finite = values.isfinite()
        self._nan += int(values.isnan().sum())
        self._inf += int(values.isinf().sum())
        values = values[finite]
        count = values.numel()
        if count == 0:
            return
        mean = float(values.mean())
        total = self._count + count
        self._squares += float(((values - mean) ** 2).sum()) + (mean - self._mean) ** 2 * self._count * count / total
        self._mean += (mean - self._mean) * count / total
        self._count = total
        self._min = min(self._min, float(values.min()))
        self._max = max(self._max, float(values.max()))

    def stats(self) -> Stats:
        if self._count == 0:
            return Stats(nan=self._nan, inf=self._inf)
        spread = math.sqrt(self._squares / self._count)
        return Stats(self._min, self._max, self._mean, spread, self._nan, self._inf)
