"""From the index back to values: the structure, and all that stands in it."""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lastgood._loading.storages import torch_dtype
from lastgood.format.index import InvalidIndexError
from lastgood.format.nodes import (
    CONTAINERS,
    NUMBERED,
    BytearrayNode,
    BytesNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    FloatNode,
    IntNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    ShardedNode,
    SizeNode,
    TensorNode,
    TextNode,
    TupleNode,
    children,
    unpack_floats,
)


class ObjectTable:
    """The objects of an index by number, so that what was one object when it was saved is one object again."""

    def __init__(self, nodes: list[Node]) -> None:
        """``nodes``: all of the index, a container before what it holds."""
        self._shared = any(isinstance(node, ReferenceNode) for node in nodes)
        self._nodes: list[Node] = [node for node in nodes if isinstance(node, NUMBERED)] if self._shared else []
        self._made: dict[int, Any] = {}

    def resolve(self, node: Node) -> Node:
        """The node itself, or the one that it refers to."""
        return self._nodes[node.number] if isinstance(node, ReferenceNode) else node

    def made(self, node: Node) -> Any:
        """What was made of this node before, or ``None``."""
        return self._made.get(id(node)) if self._shared else None

    def remember(self, node: Node, value: Any) -> None:
        """Note what was made of a node."""
        if self._shared:
            self._made[id(node)] = value


class ValueBuilder:
    """Makes the values that nodes describe."""

    def __init__(
        self,
        table: ObjectTable,
        tensor: Callable[[TensorNode], Any],
        opaque: Callable[[OpaqueNode], Any],
        sharded: Callable[[ShardedNode], Any] = lambda node: None,
    ) -> None:
        self._table = table
        self._tensor = tensor
        self._opaque = opaque
        self._sharded = sharded

    def build(self, node: Node) -> Any:
        """The value of a node; raises ``InvalidIndexError`` for one that no writer has written."""
        try:
            return self._build(node)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise InvalidIndexError(str(error)) from error

    def _build(self, node: Node) -> Any:
        node = self._table.resolve(node)
        made = self._table.made(node)
        if made is not None:
            return made
        if isinstance(node, TensorNode):
            value = self._tensor(node)
            self._table.remember(node, value)
            return value
        if isinstance(node, (DictNode, MapNode, OrderedDictNode, ListNode)):
            return self._build_container(node)
        if isinstance(node, TupleNode):
            return tuple([self._build(item) for item in node.items])
        if isinstance(node, SetNode):
            value = {self._build(item) for item in node.items}
            self._table.remember(node, value)
            return value
        if isinstance(node, BytearrayNode):
            value = bytearray(node.value)
            self._table.remember(node, value)
            return value
        if isinstance(node, OpaqueNode):
            return self._opaque(node)
        if isinstance(node, ShardedNode):
            return self._sharded(node)
        return scalar_value(node)

    def _build_container(self, node: DictNode | MapNode | OrderedDictNode | ListNode) -> Any:
        value: Any
        if isinstance(node, ListNode):
            value = []
            self._table.remember(node, value)
            value += [self._build(item) for item in node.items]
            return value
        value = OrderedDict() if isinstance(node, OrderedDictNode) else {}
        self._table.remember(node, value)
        if isinstance(node, DictNode):
            for key, item in node.items.items():
                value[key] = self._build(item)
            return value
        for key_node, item in node.items:
            value[self._build(key_node)] = self._build(item)
        if isinstance(node, OrderedDictNode):
            for name, item in node.attributes.items():
                vars(value)[name] = self._build(item)
        return value


def scalar_value(node: Node) -> Any:
    """The value of a node that holds no others."""
    if isinstance(node, IntNode):
        return int.from_bytes(node.value, "little", signed=True)
    if isinstance(node, FloatNode):
        return struct.unpack(">d", node.value)[0]
    if isinstance(node, ComplexNode):
        return complex(*unpack_floats(node.value))
    if isinstance(node, TextNode):
        return node.value.decode("utf-8", "surrogatepass")
    if isinstance(node, BytesNode):
        return node.value
    if isinstance(node, SizeNode):
        return torch.Size(node.items)
    if isinstance(node, DtypeNode):
        return torch_dtype(node.name)
    if isinstance(node, DeviceNode):
        return torch.device(node.device_type if node.index is None else f"{node.device_type}:{node.index}")
    return node


def tensors_in(node: Node, table: ObjectTable, followed: set[int]) -> Iterator[TensorNode | OpaqueNode | ShardedNode]:
    """The tensors and opaque values inside a node, references followed; one may come more than once.

    A tensor that is spread over ranks comes as such, without its parts. ``followed`` keeps what references have led to
    already: no container is followed into twice, however often the file refers to it.
    """
    waiting = [node]
    while waiting:
        inner = waiting.pop()
        resolved = table.resolve(inner)
        if resolved is not inner:
            if id(resolved) in followed:
                continue
            followed.add(id(resolved))
        if isinstance(resolved, (TensorNode, OpaqueNode, ShardedNode)):
            yield resolved
        elif isinstance(resolved, CONTAINERS):
            waiting += children(resolved)
