"""How far tensors differ, element by element, for many small tensors at once. Needs torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


class Difference(msgspec.Struct, gc=False):
    """What the elements of one pair of tensors add up to; :meth:`add` joins that of another part of it."""

    changed: int = 0
    nan_in_both: int = 0
    nan_in_one: int = 0
    square_a: float = 0.0
    square_change: float = 0.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    largest_a: float = 0.0

    def add(self, other: "Difference") -> None:
        """Join the difference of another part of the same tensors."""
        self.changed += other.changed
        self.nan_in_both += other.nan_in_both
        self.nan_in_one += other.nan_in_one
        self.square_a += other.square_a
        self.square_change += other.square_change
        self.max_abs = max(self.max_abs, other.max_abs)
        self.max_rel = max(self.max_rel, other.max_rel)
        self.largest_a = max(self.largest_a, other.largest_a)


def measure(a: "Tensor", b: "Tensor", lengths: Sequence[int]) -> list[Difference]:
    """The difference of each pair of tensors, whose elements stand in rows ``a`` and ``b`` of one dtype.

    ``lengths`` says how many elements belong to each tensor; none is 0.
    """
    import torch

    dtype, bits_a, bits_b = a.dtype, _bits(a), _bits(b)
    a, segments = wide(a), torch.tensor(lengths)
    nan_a = a.isnan()
    if torch.equal(bits_a, bits_b):
        size = a.abs().masked_fill(nan_a, 0)
        columns = (per_tensor(nan_a, segments, "sum"), per_tensor(size * size, segments, "sum"))
        return [
            Difference(nan_in_both=int(nans), square_a=square, largest_a=most)
            for nans, square, most in zip(*columns, per_tensor(size, segments, "max"), strict=True)
        ]
    b = wide(b)
    nan_b = b.isnan()
    both, one = nan_a & nan_b, nan_a ^ nan_b
    exact = not (dtype.is_floating_point or dtype.is_complex)
    differ = bits_a != bits_b if exact else (a != b) & ~both
    # Neighbours among large integers may be one number as floats.
    change = (b - a).abs().clamp(min=1.0 if exact else 0.0).masked_fill(~(differ & ~one), 0)
    size = a.abs().masked_fill(nan_a | one, 0)
    relative = torch.where(size > 0, change / size, 0.0).nan_to_num(nan=0.0, posinf=math.inf)
    counts = [map(int, per_tensor(column, segments, "sum")) for column in (differ, both, one)]
    squares = [per_tensor(column * column, segments, "sum") for column in (size, change)]
    largest = [per_tensor(column, segments, "max") for column in (change.masked_fill(one, math.inf), relative, size)]
    return list(map(Difference, *counts, *squares, *largest))


def per_tensor(values: "Tensor", lengths: "Tensor", reduction: str) -> list[float]:
    """The sum, the largest or the smallest of the elements of each tensor: ``reduction`` is sum, max or min."""
    return per_segment(values, lengths, reduction).tolist()


def per_segment(values: "Tensor", lengths: "Tensor", reduction: str) -> "Tensor":
    """Like :func:`per_tensor`, as a tensor."""
    import torch

    if values.dtype == torch.bool and not values.any():
        return torch.zeros(len(lengths), dtype=torch.float64)
    values = values.to(torch.float64)
    if len(lengths) == 1:
        whole = values.sum() if reduction == "sum" else values.amax() if reduction == "max" else values.amin()
        return whole.view(1)
    return torch.segment_reduce(values, reduction, lengths=lengths, axis=0)


def row_of(data: Sequence[bytes], dtype: str) -> "Tensor":
    """The elements in these bytes in one row."""
    import torch

    from lastgood._loading.storages import torch_dtype

    return torch.frombuffer(bytearray().join(data), dtype=torch.uint8).view(torch_dtype(dtype))


def flat(tensor: "Tensor") -> "Tensor":
    """The elements of a tensor in a row."""
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1)


def wide(row: "Tensor") -> "Tensor":
    """The elements as float64 or complex128."""
    import torch

    if row.is_complex():
        return row.to(torch.complex128)
    if row.is_floating_point() and row.itemsize == 1:
        row = row.to(torch.float32)
    return row.to(torch.float64)


def _bits(row: "Tensor") -> "Tensor":
    """The elements as integers of their size; those of complex128 as two each."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return row.view(kinds.get(row.itemsize, torch.int64))
