"""What moved between two steps: the comparison of their states, cut to what a page can show."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lastgood.cli._report.data import LayerMove, Movement, TensorMove
from lastgood.cli._report.words import printable

if TYPE_CHECKING:
    from lastgood.cli._compare import Comparison, TensorChange

MOST_TENSORS = 500
MOST_LAYERS = 200
MOST_KEYS = 200


def movement_of(step_a: int, step_b: int, comparison: "Comparison") -> Movement:
    """The layers and tensors that moved most, and the keys that are not in both, as many as a page can show."""
    ranked = sorted(comparison.tensors, key=_rank, reverse=True)
    return Movement(
        step_a=step_a,
        step_b=step_b,
        count=len(comparison.tensors),
        equal=sum(tensor.equal for tensor in comparison.tensors),
        layers=[
            LayerMove(path=printable(layer.path) or "(all)", relative=_finite(layer.rms_change), tensors=layer.tensors)
            for layer in comparison.layers[:MOST_LAYERS]
        ],
        layers_count=len(comparison.layers),
        tensors=[_move(tensor) for tensor in ranked[:MOST_TENSORS]],
        only_in_a=_keys(comparison.only_in_a),
        only_in_b=_keys(comparison.only_in_b),
        changed_kind=_keys([f"{change.path}: {change.a}, then {change.b}" for change in comparison.changed_kind]),
        changed_values=_keys([f"{change.path}: {change.a}, then {change.b}" for change in comparison.changed_values]),
        not_compared=_keys(comparison.not_compared),
    )


def _rank(tensor: "TensorChange") -> tuple[bool, float, float]:
    """What has become NaN, or was no number before, is what somebody looks for first."""
    return tensor.nan_in_one > 0, tensor.rms_change, tensor.max_abs


def _move(tensor: "TensorChange") -> TensorMove:
    return TensorMove(
        path=printable(tensor.path),
        equal=tensor.equal,
        nan_in_one=tensor.nan_in_one,
        relative=_finite(tensor.rms_change),
        max_abs=_finite(tensor.max_abs),
        norm=_finite(tensor.norm_a),
    )


def _keys(paths: Sequence[str]) -> list[str]:
    shown = [printable(path) for path in paths[:MOST_KEYS]]
    return shown + [f"... and {len(paths) - MOST_KEYS:,} more"] * (len(paths) > MOST_KEYS)


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
