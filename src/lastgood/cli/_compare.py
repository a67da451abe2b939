"""What has changed between two checkpoints: keys, plain values, and each tensor, in bounded memory. Needs torch."""

import io
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lastgood._contents.reading import local_storage, rank_files
from lastgood._contents.shown import kind_name, show_value
from lastgood.cli._measure import Difference, flat, measure, row_of
from lastgood.cli._sides import Side, side_of, side_of_file
from lastgood.cli._tensors import BATCH_ELEMENTS, SavedTensor, TensorSource, batches, boxes, by_dtype
from lastgood.cli._whole import is_checkpoint_of_many
from lastgood.errors import UnsafeCheckpointError
from lastgood.format.mesh import whole
from lastgood.format.nodes import (
    CONTAINERS,
    DictNode,
    Node,
    OpaqueNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    TensorNode,
    encode_node,
    join_path,
    keyed_children,
    walk_leaves,
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
    """Compare two files or checkpoint directories.

    Checkpoints that several ranks committed together are compared as one state each, whatever their layouts are:
    tensors that are spread over ranks as whole ones, and values that ranks have of their own rank by rank. Other
    directories are compared file by file. Whether a tensor is a Parameter or requires grad makes no difference, nor
    does what it shares memory with.
    """
    found = _Found()
    if is_checkpoint_of_many(path_a) or is_checkpoint_of_many(path_b):
        with ExitStack() as stack:
            a, b = (side_of(path, stack) for path in (path_a, path_b))
            _StateComparison(a, b, "", found, left_out=a.own | b.own).run()
            _compare_own(a, b, found)
    else:
        _compare_files(path_a, path_b, found)
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


def _compare_files(path_a: str, path_b: str, found: "_Found") -> None:
    storage = local_storage()
    files_a, files_b = (rank_files(storage, path) or {0: path} for path in (path_a, path_b))
    several = len(files_a) > 1 or len(files_b) > 1
    found.only_in_a += [f"rank {rank}" for rank in files_a if rank not in files_b]
    found.only_in_b += [f"rank {rank}" for rank in files_b if rank not in files_a]
    for rank, file_a in files_a.items():
        if rank in files_b:
            with ExitStack() as stack:
                a, b = (side_of_file(stack.enter_context(TensorSource(file))) for file in (file_a, files_b[rank]))
                _StateComparison(a, b, f"rank {rank}: " if several else "", found).run()


def _compare_own(a: Side, b: Side, found: "_Found") -> None:
    """Compare the values that ranks have of their own: those of each rank with those of the same one."""
    own = a.own | b.own
    for rank in range(max(len(a.files), len(b.files)) if own else 0):
        prefix = f"rank {rank}: "
        leaves_a, leaves_b = ({path: leaf for path, leaf in _leaves(side, rank) if path in own} for side in (a, b))
        found.only_in_a += _only(a, rank, [path for path in leaves_a if path not in leaves_b])
        found.only_in_b += _only(b, rank, [path for path in leaves_b if path not in leaves_a])
        both = [(path, leaf, leaves_b[path]) for path, leaf in leaves_a.items() if path in leaves_b]
        if both:
            file_a, file_b = side_of_file(a.files[rank]), side_of_file(b.files[rank])
            _StateComparison(file_a, file_b, prefix, found).run(both)


def _leaves(side: Side, rank: int) -> list[tuple[str, Node]]:
    return list(walk_leaves(side.files[rank].contents.root)) if rank < len(side.files) else []


def _only(side: Side, rank: int, paths: list[str]) -> list[str]:
    """How to name what only one side has of a rank: the rank alone, if that is all that it has."""
    return (
        [f"rank {rank}"] if paths and len(paths) == len(_leaves(side, rank)) else [f"rank {rank}: {p}" for p in paths]
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
    a: SavedTensor
    b: SavedTensor


class _StateComparison:
    """The comparison of two files, or of two states; key paths that are ``left_out`` are passed over."""

    def __init__(self, a: Side, b: Side, prefix: str, found: _Found, left_out: Collection[str] = ()) -> None:
        self._a, self._b = a, b
        self._found = found
        self._left_out = left_out
        self._tensor_types = (TensorNode, ShardedNode) if a.is_joint else (TensorNode,)
        self.prefix = prefix

    def run(self, starts: Sequence[tuple[str, Node, Node]] | None = None) -> None:
        """Compare all that is below these pairs of values; by default everything."""
        pairs = list(self._walk([("", self._a.root, self._b.root)] if starts is None else starts))
        for numbers in batches([math.prod(pair.a.shape) for pair in pairs], BATCH_ELEMENTS):
            batch = pairs[numbers.start : numbers.stop]
            is_large = math.prod(batch[0].a.shape) > _PIECE_ELEMENTS
            differences = [self._in_pieces(batch[0])] if is_large else self._together(batch)
            self._found.tensors += map(_change, batch, differences)

    def _walk(self, starts: Sequence[tuple[str, Node, Node]]) -> Iterator[_Pair]:
        """Compare everything but tensors; yields the pairs of tensors that can be compared."""
        waiting = list(reversed(starts))
        while waiting:
            path, node_a, node_b = waiting.pop()
            a, b = self._a.tensor(node_a), self._b.tensor(node_b)
            if path in self._left_out:
                continue
            if isinstance(a, ShardedNode) and isinstance(b, ShardedNode) and not self._a.is_joint:
                self._compare_layouts(path, a, b)
            if isinstance(a, self._tensor_types) and isinstance(b, self._tensor_types):
                if (a.dtype, a.shape) == (b.dtype, b.shape):
                    yield _Pair(self.prefix + path, a, b)
                else:
                    self._kind_changed(path, show_value(a), show_value(b))
            elif self._descends(a) and self._descends(b):
                if kind_name(a) != kind_name(b):
                    self._kind_changed(path, kind_name(a), kind_name(b))
                waiting += reversed(self._common_children(path, a, b))
            else:
                self._compare_values(path, a, b)

    def _descends(self, node: Node) -> bool:
        """Sets are compared as a whole: their items have no keys."""
        if isinstance(node, ShardedNode):
            return not self._a.is_joint
        return isinstance(node, CONTAINERS) and not isinstance(node, SetNode)

    def _common_children(self, path: str, a: Node, b: Node) -> list[tuple[str, Node, Node]]:
        inside_a = {join_path(path, key): node for key, node in keyed_children(a)}
        if isinstance(a, DictNode) and isinstance(b, DictNode) and list(a.items) == list(b.items):
            return list(zip(inside_a, a.items.values(), b.items.values(), strict=True))
        inside_b = {join_path(path, key): node for key, node in keyed_children(b)}
        known = self._left_out
        only_a = [name for name in inside_a if name not in inside_b and name not in known]
        only_b = [name for name in inside_b if name not in inside_a and name not in known]
        self._found.only_in_a += [self.prefix + name for name in only_a]
        self._found.only_in_b += [self.prefix + name for name in only_b]
        return [(name, node, inside_b[name]) for name, node in inside_a.items() if name in inside_b]

    def _compare_layouts(self, path: str, a: ShardedNode, b: ShardedNode) -> None:
        """Of single files of ranks: whether they hold the same parts; the parts themselves are compared one by one."""
        shown = [f"{show_value(node)}, {', '.join(node.placements)}, parts at {node.offsets}" for node in (a, b)]
        if shown[0] != shown[1]:
            self._kind_changed(path, *shown)

    def _kind_changed(self, path: str, a: str, b: str) -> None:
        self._found.changed_kind.append(KindChange(self.prefix + path, a, b))

    def _compare_values(self, path: str, a: Node, b: Node) -> None:
        self._found.values_compared += 1
        if isinstance(a, ReferenceNode) and isinstance(b, ReferenceNode):
            shared_a, shared_b = self._a.first_path(a), self._b.first_path(b)
            if shared_a != shared_b:
                self._value_changed(path, f"the same object as {shared_a}", f"the same object as {shared_b}")
        elif isinstance(a, ShardedNode) or isinstance(b, ShardedNode):
            self._kind_changed(path, *(_with_spread(node) for node in (a, b)))
        elif kind_name(a) != kind_name(b):
            self._kind_changed(path, kind_name(a), kind_name(b))
        elif isinstance(a, OpaqueNode) and isinstance(b, OpaqueNode):
            self._compare_opaque(path, a, b)
        elif encode_node(a) != encode_node(b):
            self._value_changed(path, show_value(a, _SHOWN), show_value(b, _SHOWN))

    def _value_changed(self, path: str, a: str, b: str) -> None:
        self._found.changed_values.append(ValueChange(self.prefix + path, a, b))

    def _compare_opaque(self, path: str, a: OpaqueNode, b: OpaqueNode) -> None:
        try:
            bytes_a, bytes_b = _saved(self._a.opaque(a)), _saved(self._b.opaque(b))
        except UnsafeCheckpointError:
            self._found.not_compared.append(f"{self.prefix}{path} ({a.type_name})")
            return
        if bytes_a != bytes_b:
            self._value_changed(path, f"<{a.type_name}>", "another one")

    def _in_pieces(self, pair: _Pair) -> Difference:
        """The difference of two large tensors."""
        difference = Difference()
        for box in boxes(whole(pair.a.shape), _PIECE_ELEMENTS):
            a, b = flat(self._a.source.read_part(pair.a, box)), flat(self._b.source.read_part(pair.b, box))
            difference.add(measure(a, b, [len(a)])[0])
        return difference

    def _together(self, batch: Sequence[_Pair]) -> list[Difference]:
        """The differences of many pairs of small tensors."""
        read_a = self._a.source.read_bytes([pair.a for pair in batch])
        read_b = self._b.source.read_bytes([pair.b for pair in batch])
        differences = [Difference() for _ in batch]
        for dtype, numbers in by_dtype([pair.a for pair in batch]).items():
            a, b = (row_of([read[number] for number in numbers], dtype) for read in (read_a, read_b))
            lengths = [math.prod(batch[number].a.shape) for number in numbers]
            for number, difference in zip(numbers, measure(a, b, lengths), strict=True):
                differences[number] = difference
        return differences


def _with_spread(node: Node) -> str:
    return f"{show_value(node)}{', spread over ranks' if isinstance(node, ShardedNode) else ''}"


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
