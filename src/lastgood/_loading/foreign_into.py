"""Loading parts of a file of torch's, or into given tensors: it is mapped, and what is wanted copied out of it."""

from collections.abc import Iterator
from typing import Any

import torch

from lastgood._loading.foreign import load_foreign
from lastgood._loading.merge import CheckKeys, Merge
from lastgood._loading.spread import check_targets, copy_spread
from lastgood._loading.storages import MapLocation, StoragePool, copy_of, relocated
from lastgood._loading.targets import copy_into, naming_undefined_targets
from lastgood._loading.values import ObjectTable, ValueBuilder
from lastgood.capture import describe_loaded
from lastgood.format.nodes import (
    DictNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    TensorNode,
    TupleNode,
    walk_nodes,
)
from lastgood.storage.base import StoredFile


def load_foreign_into(
    file: StoredFile, target: Any, map_location: MapLocation, *, check: bool, check_keys: CheckKeys | None = None
) -> tuple[Any, list[str]]:
    """``target`` with the values of the file, and the key paths of it that the file does not have.

    Where a value is wanted that is neither a plain tensor nor a plain Python value, the whole file passes through
    memory.
    """
    locations: dict[int, str] = {}

    def stay(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        locations[storage.data_ptr()] = location
        return storage

    described = describe_loaded(load_foreign(file, map_location=stay, mmap=True, check=check))
    root = described.index.root
    table = ObjectTable([node for node, _ in walk_nodes(root)])
    merge = Merge(table, file.path, check_keys)
    merge.plan(target, root)
    merge.check_opaque(described.opaque)
    check_targets(merge.spread, file.path)

    mapped = StoragePool(described.index.storages, "cpu")
    made = StoragePool(described.index.storages, map_location)
    fresh = {node.storage for node in merge.fresh if isinstance(node, TensorNode)}
    for number, storage in enumerate(described.storages):
        mapped.give(number, storage)
    if any(isinstance(node, OpaqueNode) for node in merge.fresh):
        whole = load_foreign(file, map_location=map_location, mmap=False, check=False)
        values = {id(node): value for node, value in _leaves(root, whole)}
        builder = ValueBuilder(table, lambda node: values[id(node)], lambda node: values[id(node)])
    else:
        for number in fresh:
            storage = described.storages[number]
            location = locations.get(storage.data_ptr(), "cpu")
            made.give(number, relocated(copy_of(storage), location, map_location))
        builder = ValueBuilder(table, made.tensor, described.opaque)

    with naming_undefined_targets(file.path, [path for path, _, _ in (*merge.in_place, *merge.spread)]):
        for _, tensor, saved in merge.spread:
            if isinstance(saved, TensorNode):
                copy_spread(tensor, mapped.tensor(saved))
        for _, tensor, node in merge.in_place:
            copy_into(tensor, mapped.tensor(node) if isinstance(node, TensorNode) else described.opaque(node))
        return merge.carry_out(builder), merge.missing


def _leaves(root: Node, value: Any) -> Iterator[tuple[Node, Any]]:
    """The tensors and opaque values that the nodes stand for in ``value``, which the nodes describe."""
    waiting = [(root, value)]
    while waiting:
        node, value = waiting.pop()
        if isinstance(node, (TensorNode, OpaqueNode)):
            yield node, value
        elif isinstance(node, DictNode):
            waiting += zip(node.items.values(), value.values(), strict=True)
        elif isinstance(node, (MapNode, OrderedDictNode)):
            for (key_node, item_node), (key, item) in zip(node.items, value.items(), strict=True):
                waiting += ((key_node, key), (item_node, item))
            if isinstance(node, OrderedDictNode):
                waiting += zip(node.attributes.values(), vars(value).values(), strict=True)
        elif isinstance(node, (ListNode, TupleNode)):
            waiting += zip(node.items, value, strict=True)
