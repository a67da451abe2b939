"""The keys of a checkpoint as rows: merged over its ranks, and cut where there are too many for a person."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from lastgood._contents import FileContents
from lastgood._contents.shown import json_value, kind_name, placement_text, show_value
from lastgood.format.mesh import Box, Mesh
from lastgood.format.nodes import (
    CONTAINERS,
    Node,
    ReferenceNode,
    ShardedNode,
    TensorNode,
    join_path,
    keyed_children,
    parts_of,
)
from lastgood.format.references import References
from lastgood.format.spec import DTYPES

MOST_ROWS = 300
"""More than these are not printed unless asked for."""

_PART = re.compile(r"\[\d+\]|\.?[^.\[]+|.", re.DOTALL)


@dataclass(slots=True)
class Row:
    """What stands under one key, in the files of ``ranks``, which agree.

    ``shown`` is for people (empty for a tensor that is whole); ``same_as`` is the key under which the very same object
    came first, ``shares_with`` that of the first tensor on the same storage. A tensor that is spread over ranks has one
    row, with its global shape and the ``mesh`` it is on; a part of it, ``box``. ``differs``: not all ranks have the
    same value.
    """

    path: str
    kind: str
    ranks: list[int]
    shown: str
    node: Node
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    nbytes: int = 0
    same_as: str | None = None
    shares_with: str | None = None
    mesh: Mesh | None = None
    box: Box | None = None
    has_parts_below: bool = False
    differs: bool = False

    @property
    def is_container(self) -> bool:
        """Whether other rows may stand below it."""
        return isinstance(self.node, CONTAINERS)

    @property
    def times(self) -> int:
        """How often its bytes are there: once a rank, or once if it is spread over them; its parts may count for it."""
        if self.has_parts_below:
            return 0
        return 1 if self.mesh is not None else len(self.ranks)


@dataclass(slots=True)
class Group:
    """Rows that are not printed one by one: all those whose keys begin with ``path``."""

    path: str
    rows: int = 0
    tensors: int = 0
    nbytes: int = 0


@dataclass
class _Merged:
    """The rows of all files, by what they show, and by rank if these are to be told apart."""

    by_rank: bool
    with_parts: bool = False
    rows: dict[tuple[object, ...], Row] = field(default_factory=dict)
    meshes: dict[Mesh, Mesh] = field(default_factory=dict)

    def known_meshes(self, meshes: Iterable[Mesh]) -> list[Mesh]:
        """The same object for the same mesh of any file: comparing all their ranks for every tensor would take long."""
        return [self.meshes.setdefault(mesh, mesh) for mesh in meshes]

    def add(self, row: Row) -> None:
        """One more row, or one more rank for a row that is there."""
        rank = row.ranks[0] if self.by_rank and row.mesh is None else 0
        what = (row.path, row.kind, row.shown, row.dtype, row.shape, id(row.mesh))
        known = self.rows.setdefault((*what, rank), row)
        if known is not row:
            known.ranks += row.ranks
            known.shares_with = known.shares_with or row.shares_with  # a rank without parts of a tensor cannot tell


def rows_of(files: Sequence[FileContents], *, by_rank: bool = False, own: Collection[str] = ()) -> list[Row]:
    """A row for each key of each file, a container before what is in it; ranks that agree share one, or none does.

    A list or tuple that can be shown in a few words has no rows for its items. Of a single file, the parts of spread
    tensors have rows, too. ``own`` are the keys of values that the ranks do not have alike.
    """
    merged = _Merged(by_rank, len(files) == 1)
    for file in files:
        _add_rows(file, merged)
    rows = list(merged.rows.values())
    if own:
        for row in rows:
            row.differs = row.path in own
    return rows if len(files) == 1 else _beside_each_other(rows)


def _beside_each_other(rows: list[Row]) -> list[Row]:
    """Ranks that differ under one key stand next to each other."""
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(row.path, len(places))
    return sorted(rows, key=lambda row: places[row.path])


def _add_rows(file: FileContents, merged: _Merged) -> None:
    references = References(file.root)
    first_of_node: dict[int, str] = {}
    first_on_storage: dict[int, str] = {}
    meshes = merged.known_meshes(file.meshes)
    boxes: dict[int, Box] = {}
    waiting: list[tuple[str, Node]] = [("", file.root)]
    while waiting:
        path, node = waiting.pop()
        found = references.tensor(node)
        if isinstance(found, TensorNode):
            row = _tensor_row(path, found, file.rank)
            first = first_of_node.setdefault(id(found), path)
            sharing = first_on_storage.setdefault(found.storage, path)
            row.same_as = first if first != path else None
            row.box = boxes.get(id(found))  # of what it shares, the row of the whole tensor tells
            row.shares_with = sharing if sharing != path and row.same_as is None and row.box is None else None
        elif isinstance(node, ShardedNode):
            row = _sharded_row(path, node, meshes[node.mesh], file.rank)
            for box, part in parts_of(node):
                sharing = first_on_storage.setdefault(part.storage, path)
                row.shares_with = sharing if sharing != path else None
                boxes[id(part)] = box
            if merged.with_parts:
                row.has_parts_below = True
                waiting += reversed([(join_path(path, key), item) for key, item in keyed_children(node)])
        else:
            row = Row(path, kind_name(node), [file.rank], show_value(node), node)
            if isinstance(node, ReferenceNode):
                row.same_as = references.first_path(node)
        if path or row.shape is not None or not row.is_container:
            merged.add(row)
        if row.shape is None and row.is_container and not row.shown.startswith(("[", "(", "{")):
            inside = [(join_path(path, key), value) for key, value in keyed_children(node)]
            waiting += reversed(inside)


def _tensor_row(path: str, node: TensorNode, rank: int) -> Row:
    nbytes = math.prod(node.shape) * DTYPES[node.dtype].itemsize
    kind = kind_name(node)
    return Row(path, kind, [rank], "", node, node.dtype, node.shape, nbytes)


def _sharded_row(path: str, node: ShardedNode, mesh: Mesh, rank: int) -> Row:
    nbytes = math.prod(node.shape) * DTYPES[node.dtype].itemsize
    shown = placement_text(node.placements, mesh)
    return Row(path, kind_name(node), [rank], shown, node, node.dtype, node.shape, nbytes, mesh=mesh)


def cut(rows: Sequence[Row], depth: int | None, *, everything: bool) -> list[Row | Group]:
    """What to print of the rows.

    With ``depth``, keys of more parts than that are grouped. Without it, so that at most :data:`MOST_ROWS` are left,
    if that can be; then the rest is left out. With ``everything``, all rows.
    """
    if everything or (depth is None and len(rows) <= MOST_ROWS):
        return list(rows)
    parts = [tuple(_PART.findall(row.path)) for row in rows]
    if depth is not None:
        return _grouped(rows, parts, depth)
    best = 1
    deepest = max(map(len, parts))
    while best < deepest and len({names[: best + 1] for names in parts}) <= MOST_ROWS:
        best += 1
    return _grouped(rows, parts, best)


def _grouped(rows: Sequence[Row], parts: Sequence[tuple[str, ...]], depth: int) -> list[Row | Group]:
    groups: dict[tuple[str, ...], Group] = {}
    kept: list[tuple[tuple[str, ...], Row | Group]] = []
    for row, names in zip(rows, parts, strict=True):
        if len(names) <= depth:
            kept.append((names, row))
            continue
        start = names[:depth]
        if start not in groups:
            groups[start] = Group("".join(start))
            kept.append((start, groups[start]))
        group = groups[start]
        group.rows += 1
        group.tensors += row.dtype is not None and row.box is None
        group.nbytes += row.nbytes * row.times
    # The row of a container says no more than the group of what is in it.
    return [item for names, item in kept if isinstance(item, Group) or not (item.is_container and names in groups)]


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as people write them: ``0-3, 7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def as_json(row: Row) -> dict[str, object]:
    """The row for scripts: a tensor's dtype, shape, bytes and storage, or a plain value."""
    found: dict[str, object] = {"path": row.path, "kind": row.kind, "ranks": row.ranks}
    if isinstance(row.node, TensorNode):
        found |= {"dtype": row.dtype, "shape": row.shape, "nbytes": row.nbytes, "storage": row.node.storage}
        found |= {"flags": row.node.flags, "shares_with": row.shares_with}
        if row.box is not None:
            found["offsets"] = row.box.offsets
    elif isinstance(row.node, ShardedNode):
        found |= {"dtype": row.dtype, "shape": row.shape, "nbytes": row.nbytes, "flags": row.node.flags}
        found |= {"placements": row.node.placements, "mesh": _mesh_as_json(row.mesh), "shares_with": row.shares_with}
    elif not isinstance(row.node, ReferenceNode):
        found["value"] = json_value(row.node)
    if row.differs:
        found["differs"] = True
    return found | ({"same_as": row.same_as} if row.same_as is not None else {})


def _mesh_as_json(mesh: Mesh | None) -> dict[str, object] | None:
    return None if mesh is None else {"shape": mesh.shape, "names": mesh.names, "ranks": mesh.ranks}
