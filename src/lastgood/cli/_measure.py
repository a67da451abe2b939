"""How far tensors differ, element by element, for many small tensors at once. Needs torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor


@dataclass
class Difference:
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


def measure(pairs: "Sequence[tuple[Tensor, Tensor]]") -> list[Difference]:
    """The difference of each pair of tensors of one shape; all are of one dtype, and none is empty."""
    import torch

    dtype = pairs[0][0].dtype
    lengths = torch.tensor([a.numel() for a, _ in pairs])
    bits_a = torch.cat([_bits(a) for a, _ in pairs])
    bits_b = torch.cat([_bits(b) for _, b in pairs])
    a = _wide(bits_a.view(dtype))
    nan_a = a.isnan()
    if torch.equal(bits_a, bits_b):
        size = a.abs().masked_fill(nan_a, 0)
        sums = _per_tensor([nan_a, size * size], lengths, "sum")
        largest = _per_tensor([size], lengths, "max")
        return [
            Difference(nan_in_both=int(nans), square_a=square, largest_a=most)
            for (nans, square), (most,) in zip(sums, largest, strict=True)
        ]
    b = _wide(bits_b.view(dtype))
    nan_b = b.isnan()
    both, one = nan_a & nan_b, nan_a ^ nan_b
    exact = not (dtype.is_floating_point or dtype.is_complex)
    differ = bits_a != bits_b if exact else (a != b) & ~both
    # Neighbours among large integers may be one number as floats.
    change = (b - a).abs().clamp(min=1.0 if exact else 0.0).masked_fill(~(differ & ~one), 0)
    size = a.abs().masked_fill(nan_a | one, 0)
    relative = torch.where(size > 0, change / size, 0.0).nan_to_num(nan=0.0, posinf=math.inf)
    sums = _per_tensor([differ, both, one, size * size, change * change], lengths, "sum")
    largest = _per_tensor([change.masked_fill(one, math.inf), relative, size], lengths, "max")
    return [
        Difference(int(counts[0]), int(counts[1]), int(counts[2]), *counts[3:], *most)
        for counts, most in zip(sums, largest, strict=True)
    ]


def _per_tensor(columns: "list[Tensor]", lengths: "Tensor", reduction: str) -> list[list[float]]:
    import torch

    values = torch.stack([column.to(torch.float64) for column in columns], dim=-1)
    if len(lengths) == 1:
        reduced = (values.sum(0) if reduction == "sum" else values.amax(0)).unsqueeze(0)
    else:
        reduced = torch.segment_reduce(values, reduction, lengths=lengths, axis=0)
    rows: list[list[float]] = reduced.tolist()
    return rows


def wide(tensor: "Tensor") -> "Tensor":
    """The elements in a row, as float64 or complex128."""
    return _wide(_bits(tensor).view(tensor.dtype))


def _wide(flat: "Tensor") -> "Tensor":
    import torch

    if flat.is_complex():
        return flat.to(torch.complex128)
    if flat.is_floating_point() and flat.itemsize == 1:
        flat = flat.to(torch.float32)
    return flat.to(torch.float64)


def _bits(tensor: "Tensor") -> "Tensor":
    """The elements in a row, as integers of their size; those of complex128 as two each."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous().view(-1).view(kinds.get(tensor.itemsize, torch.int64))
