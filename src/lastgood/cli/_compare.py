"""What has changed between two checkpoints: keys, plain values, and each tensor, in bounded memory. Needs torch."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lastgood._contents.reading import References, local_storage, rank_files
from lastgood._contents.shown import kind_name, show_value
from lastgood.cli._measure import Difference, flat, measure, row_of
from lastgood.cli._tensors import BATCH_ELEMENTS, TensorSource, batches, by_dtype, pieces
from lastgood.errors import UnsafeCheckpointError
from lastgood.format.index import (
    CONTAINERS,
    DictNode,
    Node,
    OpaqueNode,
    ReferenceNode,
    SetNode,
    TensorNode,
    encode_node,
    join_path,
    keyed_children,
)

_PIECE_ELEMENTS = 512 * 1024
"""So many elements are measured at a time, which takes about a hundred bytes each."""

_SHOWN = 40


class TensorChange(msgspec.Struct, frozen=True, gc=False):
    """How one tensor changed from ``a`` to ``b``; NaN in the same place counts as equal.

    ``max_abs`` is the largest ``|b - a|``, ``max_rel`` the largest ``|b - a| / |a|`` where ``a`` is not 0 (``None`` if
    it is 0 everywhere). ``norm_a`` and ``norm_change`` are the Euclidean norms of ``a`` and of ``b - a``;
    ``rms_change`` is their quotient: how far the tensor moved, measured by its own size. Places where one of the two
    is NaN make ``max_abs`` infinite and are left out of the norms.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    equal: bool
    changed: int
    max_abs: float
    max_rel: float | None
    rms_change: float
    norm_a: float
    norm_change: float
    nan_in_both: int
    nan_in_one: int


@dataclass(frozen=True)
class KindChange:
    """A key under which the two hold values of different kinds, or tensors of different shape or dtype."""

    path: str
    a: str
    b: str


@dataclass(frozen=True)
class ValueChange:
    """A plain value that differs, as shown to people."""

    path: str
    a: str
    b: str


class LayerChange(msgspec.Struct, frozen=True, gc=False):
    """How far the floating-point tensors of one layer (a key path without its last part) moved together."""

    path: str
    tensors: int
    rms_change: float
    norm_a: float
    norm_change: float


@dataclass(frozen=True)
class Comparison:
    """All that differs. Keys that only one has are named once, with all below them."""

    path_a: str
    path_b: str
    tensors: tuple[TensorChange, ...]
    values_compared: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    changed_kind: tuple[KindChange, ...]
    changed_values: tuple[ValueChange, ...]
    not_compared: tuple[str, ...]
    layers: tuple[LayerChange, ...]

    @property
    def is_equal(self) -> bool:
        """Whether no difference was found."""
        lists = (self.only_in_a, self.only_in_b, self.changed_kind, self.changed_values)
        return not any(lists) and all(tensor.equal for tensor in self.tensors)


def compare_states(path_a: str, path_b: str) -> Comparison:
    """Compare two files or checkpoint directories (rank by rank).

    Whether a tensor is a Parameter or requires grad makes no difference, nor does what it shares memory with.
    """
    storage = local_storage()
    files_a, files_b = (rank_files(storage, path) or {0: path} for path in (path_a, path_b))
    found = _Found()
    several = len(files_a) > 1 or len(files_b) > 1
    found.only_in_a += [f"rank {rank}" for rank in files_a if rank not in files_b]
    found.only_in_b += [f"rank {rank}" for rank in files_b if rank not in files_a]
    for rank, file_a in files_a.items():
        if rank in files_b:
            with ExitStack() as stack:
                source_a = stack.enter_context(TensorSource(file_a))
                source_b = stack.enter_context(TensorSource(files_b[rank]))
                _FileComparison(source_a, source_b, f"rank {rank}: " if several else "", found).run()
    return Comparison(
        path_a=path_a,
        path_b=path_b,
        tensors=tuple(found.tensors),
        values_compared=found.values_compared,
        only_in_a=tuple(found.only_in_a),
        only_in_b=tuple(found.only_in_b),
        changed_kind=tuple(found.changed_kind),
        changed_values=tuple(found.changed_values),
        not_compared=tuple(found.not_compared),
        layers=rank_layers(found.tensors),
    )


def layer_of(path: str) -> str:
    """The path without its last part."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def rank_layers(tensors: list[TensorChange]) -> tuple[LayerChange, ...]:
    """The layers by how far they moved, the one that moved most first; integers, which only count, are left out."""
    by_layer: dict[str, list[TensorChange]] = {}
    for tensor in tensors:
        if tensor.dtype.startswith(("float", "bfloat", "complex")):
            by_layer.setdefault(layer_of(tensor.path), []).append(tensor)
    layers = []
    for path, members in by_layer.items():
        norm_a = math.hypot(*[member.norm_a for member in members])
        norm_change = math.hypot(*[member.norm_change for member in members])
        layers.append(LayerChange(path, len(members), _quotient(norm_change, norm_a), norm_a, norm_change))
    return tuple(sorted(layers, key=lambda layer: layer.rms_change, reverse=True))


def _quotient(change: float, norm: float) -> float:
    if change == 0:
        return 0.0
    if math.isinf(change) or norm == 0:
        return math.inf
    return change / norm


@dataclass
class _Found:
    tensors: list[TensorChange] = field(default_factory=list)
    values_compared: int = 0
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    changed_kind: list[KindChange] = field(default_factory=list)
    changed_values: list[ValueChange] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)


class _Pair(msgspec.Struct, frozen=True, gc=False):
    path: str
    a: TensorNode
    b: TensorNode


class _FileComparison:
    """The comparison of one rank's two files."""

    def __init__(self, a: TensorSource, b: TensorSource, prefix: str, found: _Found) -> None:
        self._a, self._b = a, b
        self._references_a, self._references_b = References(a.contents.root), References(b.contents.root)
        self._prefix = prefix
        self._found = found

    def run(self) -> None:
        pairs = list(self._walk())
        for numbers in batches([math.prod(pair.a.shape) for pair in pairs], BATCH_ELEMENTS):
            batch = pairs[numbers.start : numbers.stop]
            is_large = math.prod(batch[0].a.shape) > _PIECE_ELEMENTS
            differences = [self._in_pieces(batch[0])] if is_large else self._together(batch)
            self._found.tensors += map(_change, batch, differences)

    def _walk(self) -> Iterator[_Pair]:
        """Compare everything but tensors; yields the pairs of tensors that can be compared."""
        waiting = [("", self._a.contents.root, self._b.contents.root)]
        while waiting:
            path, node_a, node_b = waiting.pop()
            a, b = self._references_a.tensor(node_a), self._references_b.tensor(node_b)
            if isinstance(a, TensorNode) and isinstance(b, TensorNode):
                if (a.dtype, a.shape) == (b.dtype, b.shape):
                    yield _Pair(self._prefix + path, a, b)
                else:
                    self._kind_changed(path, show_value(a), show_value(b))
            elif _descends(a) and _descends(b):
                if kind_name(a) != kind_name(b):
                    self._kind_changed(path, kind_name(a), kind_name(b))
                waiting += reversed(self._common_children(path, a, b))
            else:
                self._compare_values(path, a, b)

    def _common_children(self, path: str, a: Node, b: Node) -> list[tuple[str, Node, Node]]:
        inside_a = {join_path(path, key): node for key, node in keyed_children(a)}
        if isinstance(a, DictNode) and isinstance(b, DictNode) and list(a.items) == list(b.items):
            return list(zip(inside_a, a.items.values(), b.items.values(), strict=True))
        inside_b = {join_path(path, key): node for key, node in keyed_children(b)}
        self._found.only_in_a += [self._prefix + name for name in inside_a if name not in inside_b]
        self._found.only_in_b += [self._prefix + name for name in inside_b if name not in inside_a]
        return [(name, node, inside_b[name]) for name, node in inside_a.items() if name in inside_b]

    def _kind_changed(self, path: str, a: str, b: str) -> None:
        self._found.changed_kind.append(KindChange(self._prefix + path, a, b))

    def _compare_values(self, path: str, a: Node, b: Node) -> None:
        self._found.values_compared += 1
        if isinstance(a, ReferenceNode) and isinstance(b, ReferenceNode):
            shared_a, shared_b = self._references_a.first_path(a), self._references_b.first_path(b)
            if shared_a != shared_b:
                self._value_changed(path, f"the same object as {shared_a}", f"the same object as {shared_b}")
        elif kind_name(a) != kind_name(b):
            self._kind_changed(path, kind_name(a), kind_name(b))
        elif isinstance(a, OpaqueNode) and isinstance(b, OpaqueNode):
            self._compare_opaque(path, a, b)
        elif encode_node(a) != encode_node(b):
            self._value_changed(path, show_value(a, _SHOWN), show_value(b, _SHOWN))

    def _value_changed(self, path: str, a: str, b: str) -> None:
        self._found.changed_values.append(ValueChange(self._prefix + path, a, b))

    def _compare_opaque(self, path: str, a: OpaqueNode, b: OpaqueNode) -> None:
        try:
            bytes_a, bytes_b = _saved(self._a.opaque(a)), _saved(self._b.opaque(b))
        except UnsafeCheckpointError:
            self._found.not_compared.append(f"{self._prefix}{path} ({a.type_name})")
            return
        if bytes_a != bytes_b:
            self._value_changed(path, f"<{a.type_name}>", "another one")

    def _in_pieces(self, pair: _Pair) -> Difference:
        """The difference of two large tensors."""
        difference = Difference()
        for part_a, part_b in zip(*(pieces(node, _PIECE_ELEMENTS) for node in (pair.a, pair.b)), strict=True):
            a, b = flat(self._a.read([part_a])[0]), flat(self._b.read([part_b])[0])
            difference.add(measure(a, b, [len(a)])[0])
        return difference

    def _together(self, batch: Sequence[_Pair]) -> list[Difference]:
        """The differences of many pairs of small tensors."""
        read_a = self._a.read_bytes([pair.a for pair in batch])
        read_b = self._b.read_bytes([pair.b for pair in batch])
        differences = [Difference() for _ in batch]
        for dtype, numbers in by_dtype([pair.a for pair in batch]).items():
            a, b = (row_of([read[number] for number in numbers], dtype) for read in (read_a, read_b))
            lengths = [math.prod(batch[number].a.shape) for number in numbers]
            for number, difference in zip(numbers, measure(a, b, lengths), strict=True):
                differences[number] = difference
        return differences


def _descends(node: Node) -> bool:
    """Sets are compared as a whole: their items have no keys."""
    return isinstance(node, CONTAINERS) and not isinstance(node, SetNode)


def _saved(value: Any) -> bytes:
    import torch

    output = io.BytesIO()
    torch.save(value, output)
    return output.getvalue()


def _change(pair: _Pair, difference: Difference) -> TensorChange:
    norm_a, norm_change = math.sqrt(difference.square_a), math.sqrt(difference.square_change)
    return TensorChange(
        path=pair.path,
        dtype=pair.a.dtype,
        shape=pair.a.shape,
        equal=difference.changed == 0,
        changed=difference.changed,
        max_abs=difference.max_abs,
        max_rel=difference.max_rel if difference.largest_a > 0 else None,
        rms_change=_quotient(norm_change, norm_a),
        norm_a=norm_a,
        norm_change=norm_change,
        nan_in_both=difference.nan_in_both,
        nan_in_one=difference.nan_in_one,
    )
