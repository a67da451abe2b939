"""The structure of a state dict: whether two states differ in nothing but tensors' data and plain values.

A structure is taken together with the index of the state, and matched against later states. Matching costs no more
than looking at every container and every leaf once, most of it inside of the interpreter's C loops.
"""

import itertools
import marshal
from collections import OrderedDict
from typing import Any

import msgspec
import torch

from lastgood.format.nodes import (
    CONTAINERS,
    DictNode,
    ListNode,
    MapNode,
    Node,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    TensorNode,
    TupleNode,
)
from lastgood.sharding.local_shards import LocalShards, ShardDescription

_TENSOR_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_TYPES = frozenset({type(None), bool, int, float, str})
_FIXED_TYPES = frozenset({bytes, torch.Size, torch.dtype, torch.device})
"""Immutable values whose pickle depends on what stands before it: another value needs another pickle."""

_KEY_TYPES = (_PLAIN_TYPES - {float}) | {bytes}
"""Of these, equal keys of one type have one pickle: 0.0 and -0.0 do not."""

_Items = list[Any] | tuple[Any, ...]


class _UnmatchableError(Exception):
    """The state holds something that is not worth matching: sets, opaque values, containers that stand twice."""


class _Container(msgspec.Struct, gc=False):
    kind: type
    keys: list[Any] | None
    key_types: list[type]
    types: list[type]
    all_tensors: bool
    tensors: list[int]
    plain: list[int]
    fixed: list[int]
    inside: list[tuple[int, "_Container"]]
    attributes: "_Container | None"
    shards: list[tuple[int, ShardDescription]]


class _Place(msgspec.Struct, frozen=True, gc=False):
    """Where in the index a plain value stands, and which of the pickle's it is."""

    node: Any
    key: Any
    ordinal: int
    in_attributes: bool


class Leaves:
    """What a walk over a state has found, in the order of the walk."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.plain: list[Any] = []
        self.fixed: list[Any] = []
        self.shards: list[LocalShards] = []
        self.containers: list[int] = []


class Structure:
    """The structure of one state. ``tensor_nodes`` are the nodes of its tensors in the order of the walk.

    A tensor that stands at several places has its node at each.
    """

    def __init__(self, root: _Container, tensor_nodes: list[TensorNode], places: list["_Place"]) -> None:
        self._root = root
        self._places = places
        self.tensor_nodes = tensor_nodes

    def match(self, state: Any) -> Leaves | None:
        """The leaves of a state that has this structure; ``None`` for any other."""
        leaves = Leaves()
        if not _match(self._root, state, leaves) or len(set(leaves.containers)) != len(leaves.containers):
            return None
        return leaves

    def pickle_number(self, number: int) -> int:
        """Which plain value of :func:`~lastgood.format.pickle_writer.encode_template` the one of the walk is."""
        return self._places[number].ordinal

    def set_plain(self, number: int, value: Node) -> None:
        """Put ``value`` into the index in the place of plain value ``number`` of the walk."""
        place = self._places[number]
        if place.in_attributes and isinstance(place.node, OrderedDictNode):
            place.node.attributes[place.key] = value
        elif isinstance(place.node, (MapNode, OrderedDictNode)):
            place.node.items[place.key] = (place.node.items[place.key][0], value)
        else:
            place.node.items[place.key] = value


def plain_bytes(values: list[Any]) -> bytes:
    """Bytes that are the same for the same plain values and no others (equality takes 0.0 for -0.0, and 1 for True)."""
    return marshal.dumps(values, 2)


def structure_of(state: Any, root: Node) -> tuple[Structure, Leaves] | None:
    """The structure of a state, whose description is ``root``; ``None`` if it is not worth matching."""
    try:
        structure = Structure(*_Taker().take(state, root))
    except _UnmatchableError:
        return None
    leaves = structure.match(state)
    return None if leaves is None else (structure, leaves)


class _Taker:
    """Takes the structure in the order in which a pickle describes it, and sorts what it finds by the walk's order:
    a container's leaves first, then the containers in it."""

    def __init__(self) -> None:
        self._node_of: dict[int, TensorNode] = {}
        self._ordinals = itertools.count()

    def take(
        self, value: Any, node: Node, *, holder: OrderedDictNode | None = None
    ) -> tuple[_Container, list[TensorNode], list[_Place]]:
        """The container, and the nodes of the tensors and the places of the plain values in it and below it.

        ``holder`` is given for the attributes of an OrderedDict, which have no node of their own.
        """
        kind = type(value)
        keys: list[Any] | None = None
        items: _Items
        if isinstance(value, dict) and kind in (dict, OrderedDict):
            keys, items = list(value), list(value.values())
        elif isinstance(value, (list, tuple)) and kind in (list, tuple):
            items = value
        else:
            raise _UnmatchableError
        key_types = list(map(type, keys or ()))
        if not _KEY_TYPES.issuperset(key_types) or isinstance(node, (SetNode, ReferenceNode)):
            raise _UnmatchableError
        container = _Container(kind, keys, key_types, list(map(type, items)), False, [], [], [], [], None, [])
        tensor_nodes: list[TensorNode] = []
        parts_of_shards: list[TensorNode] = []
        places: list[_Place] = []
        below: list[tuple[list[TensorNode], list[_Place]]] = []
        for position, (item, inner) in enumerate(zip(items, _children(node), strict=True)):
            if isinstance(inner, (TensorNode, ReferenceNode)) and type(item) in _TENSOR_TYPES:
                container.tensors.append(position)
                tensor_nodes.append(self._tensor_node(item, inner))
            elif isinstance(inner, ShardedNode) and type(item) is LocalShards:
                container.shards.append((position, item.description))
                parts_of_shards += self._part_nodes(item, inner)
            elif type(item) in _PLAIN_TYPES:
                container.plain.append(position)
                key = keys[position] if isinstance(node, DictNode) and keys is not None else position
                places.append(_Place(holder or node, key, next(self._ordinals), holder is not None))
            elif type(item) in _FIXED_TYPES:
                container.fixed.append(position)
            elif isinstance(inner, CONTAINERS):
                taken, nodes_below, places_below = self.take(item, inner)
                container.inside.append((position, taken))
                below.append((nodes_below, places_below))
            else:
                raise _UnmatchableError
        if isinstance(node, OrderedDictNode) and node.attributes:
            taken, nodes_below, places_below = self.take(vars(value), DictNode(node.attributes), holder=node)
            container.attributes = taken
            below.append((nodes_below, places_below))
        container.all_tensors = len(container.tensors) == len(items)
        tensor_nodes += parts_of_shards
        for more_nodes, more_places in below:
            tensor_nodes += more_nodes
            places += more_places
        return container, tensor_nodes, places

    def _part_nodes(self, shards: LocalShards, node: ShardedNode) -> list[TensorNode]:
        return [
            self._tensor_node(part, part_node)
            for part, part_node in zip(shards.tensors, node.items, strict=True)
            if isinstance(part_node, (TensorNode, ReferenceNode))
        ]

    def _tensor_node(self, tensor: torch.Tensor, node: TensorNode | ReferenceNode) -> TensorNode:
        if isinstance(node, TensorNode):
            self._node_of[id(tensor)] = node
        return self._node_of[id(tensor)]


def _children(node: Node) -> list[Node]:
    if isinstance(node, DictNode):
        return list(node.items.values())
    if isinstance(node, (MapNode, OrderedDictNode)):
        return [value for _, value in node.items]
    return node.items if isinstance(node, (ListNode, TupleNode)) else []


def _match(container: _Container, value: Any, leaves: Leaves) -> bool:
    kind: Any = type(value)
    if kind is not container.kind:
        return False
    items: Any
    if container.keys is None:
        items = value
    else:
        keys = list(value)
        if keys != container.keys or list(map(type, keys)) != container.key_types:
            return False
        items = list(value.values())
    if list(map(type, items)) != container.types:
        return False
    if container.kind is not tuple:
        leaves.containers.append(id(value))
    if container.all_tensors:
        leaves.tensors += items
    else:
        leaves.tensors += [items[position] for position in container.tensors]
        leaves.plain += [items[position] for position in container.plain]
        leaves.fixed += [items[position] for position in container.fixed]
    for position, description in container.shards:
        if not _match_shards(description, items[position], leaves):
            return False
    if not all(_match(inner, items[position], leaves) for position, inner in container.inside):
        return False
    attributes = value.__dict__ if container.kind is OrderedDict else None
    if container.attributes is None:
        return not attributes
    return _match(container.attributes, attributes, leaves)


def _match_shards(description: ShardDescription, shards: LocalShards, leaves: Leaves) -> bool:
    # Most often the very same: whoever divides states remembers how.
    if shards.description is not description and shards.description != description:
        return False
    leaves.tensors += shards.tensors
    leaves.shards.append(shards)
    return True
