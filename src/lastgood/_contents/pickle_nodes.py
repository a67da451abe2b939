"""From the symbols of a pickle to nodes like those of an index of ours."""

from typing import Any

from lastgood._contents.describing_rules import (
    DescribedStorage,
    DescribingRules,
    OrderedDictSymbol,
    SetSymbol,
    opaque,
)
from lastgood._loading.pickle_symbols import DictSymbol, GlobalSymbol, ListSymbol, TupleSymbol, UsersSymbol
from lastgood.format.nodes import (
    BytearrayNode,
    BytesNode,
    ComplexNode,
    DeviceNode,
    DictNode,
    DtypeNode,
    ListNode,
    MapNode,
    Node,
    OrderedDictNode,
    ReferenceNode,
    SetNode,
    SizeNode,
    TensorNode,
    TupleNode,
    scalar_node,
)
from lastgood.format.spec import DTYPES, MAX_INDEX_DEPTH

_SPARE_NODES = 100_000
_READY = (BytesNode, ComplexNode, SizeNode, DeviceNode)
_PLAIN_TYPES = (bool, int, float, str)


def nodes_of(symbol: Any, rules: DescribingRules, pickle_size: int) -> Node:
    """The node of a walked pickle's value. What comes again is a reference, numbered as in an index of ours.

    ``pickle_size`` bounds the number of nodes: a tuple that comes again has no number and is described again.
    """
    return _Converter(rules, 10 * pickle_size + _SPARE_NODES).convert(symbol, 0)


class _Converter:
    def __init__(self, rules: DescribingRules, most_nodes: int) -> None:
        self._rules = rules
        self._nodes_left = most_nodes
        self._numbers: dict[int, int] = {}

    def convert(self, value: Any, depth: int) -> Node:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            self._rules.unsafe("holds the same values again and again")
        if value is None or type(value) in _PLAIN_TYPES:
            return scalar_node(value)
        if depth > MAX_INDEX_DEPTH:
            return opaque(f"nested more than {MAX_INDEX_DEPTH} deep")
        if isinstance(value, (TensorNode, BytearrayNode, ListSymbol, DictSymbol)):
            known = self._numbers.get(id(value))
            if known is not None:
                return ReferenceNode(known)
            self._numbers[id(value)] = len(self._numbers)
            return value if isinstance(value, (TensorNode, BytearrayNode)) else self._container(value, depth + 1)
        if isinstance(value, TupleSymbol):
            return TupleNode([self.convert(item, depth + 1) for item in value.items])
        return self._leaf(value)

    def _container(self, value: ListSymbol | DictSymbol, depth: int) -> Node:
        if isinstance(value, SetSymbol):
            return SetNode([self.convert(item, depth) for item in value.items])
        if isinstance(value, ListSymbol):
            return ListNode([self.convert(item, depth) for item in value.items])
        if isinstance(value, OrderedDictSymbol):
            items = self._pairs(value, depth)
            attributes = value.attributes.items
            named = {key: item for key, item in zip(attributes[::2], attributes[1::2], strict=True) if type(key) is str}
            return OrderedDictNode(items, {key: self.convert(item, depth) for key, item in named.items()})
        keys = value.items[::2]
        if all(type(key) is str and key.isascii() for key in keys) and len(set(keys)) == len(keys):
            values = value.items[1::2]
            return DictNode({key: self.convert(item, depth) for key, item in zip(keys, values, strict=True)})
        return MapNode(self._pairs(value, depth))

    def _pairs(self, value: DictSymbol, depth: int) -> list[tuple[Node, Node]]:
        pairs = zip(value.items[::2], value.items[1::2], strict=True)
        return [(self.convert(key, depth), self.convert(item, depth)) for key, item in pairs]

    @staticmethod
    def _leaf(value: Any) -> Node:
        if isinstance(value, _READY):
            return value
        if isinstance(value, GlobalSymbol):
            name = value.name.removeprefix("torch.")
            return DtypeNode(name) if name in DTYPES else opaque(value.name)
        if isinstance(value, UsersSymbol):
            return opaque(value.name)
        if isinstance(value, DescribedStorage):
            return opaque("torch.UntypedStorage", (value.number,))
        return opaque("value")
