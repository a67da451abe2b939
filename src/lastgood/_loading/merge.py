"""Partial loads: comparing what is wanted with what a file holds, before anything is touched."""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from lastgood._loading.storages import torch_dtype
from lastgood._loading.targets import TensorsLike
from lastgood._loading.values import ObjectTable, ValueBuilder, tensors_in
from lastgood.errors import TargetMismatchError
from lastgood.format.nodes import (
    DictNode,
    ListNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ShardedNode,
    TensorNode,
    TupleNode,
    join_path,
    list_position,
)
from lastgood.sharding.dtensors import is_dtensor, local_tensor

CheckKeys = Callable[[list[str], list[str]], None]
"""Told of the keys that are missing from a file, and of those of it that nobody wants; may refuse by raising."""


class _Fresh:
    """Stands for a value that will be newly made from a node."""

    def __init__(self, node: Node) -> None:
        self.node = node


class _Items(tuple[Any, ...]):
    """Stands for a tuple that will be newly made, unlike a tuple of the target's that stays as it is."""


class Merge:
    """A plan to load a file into a nested target: made first, carried out only when it holds.

    ``missing`` lists the paths of keys that the file does not have, ``in_place`` the tensors to be filled, ``spread``
    those of them that are spread over ranks, here or where they were saved, ``fresh`` the nodes of what must be newly
    made, and ``unread``, if ``check_keys`` is given, the keys that the file
    has in mappings of the target's and the target has not.
    """

    def __init__(self, table: ObjectTable, path: str, check_keys: CheckKeys | None = None) -> None:
        self.missing: list[str] = []
        self.unread: list[str] = []
        self._check_keys = check_keys
        self.in_place: list[tuple[str, torch.Tensor, TensorNode | OpaqueNode]] = []
        self.spread: list[tuple[str, torch.Tensor, TensorNode | ShardedNode]] = []
        self.fresh: list[TensorNode | OpaqueNode | ShardedNode] = []
        self._table = table
        self._path = path
        self._followed: set[int] = set()
        self._met: set[tuple[int, int]] = set()
        self._assignments: list[tuple[Any, Any, Any]] = []
        self._root: Any = None

    def plan(self, target: Any, root: Node) -> None:
        """Compare; raises :class:`~lastgood.errors.TargetMismatchError`, or what ``check_keys`` raises, before
        anything has been changed."""
        self._root = self._visit(target, root, "")
        if isinstance(target, (MutableMapping, list)) and self._root is not target:
            raise self._other_kind("", target)
        if self._check_keys is not None:
            self._check_keys(self.missing, self.unread)

    def check_opaque(self, opaque: Callable[[OpaqueNode], Any]) -> None:
        """Compare the targets of opaque values, once these are loaded and before anything has been changed."""
        for path, target, node in self.in_place:
            if isinstance(node, TensorNode):
                continue
            value = opaque(node)
            if not isinstance(value, torch.Tensor):
                raise self._mismatch(path, f"the target is a tensor, the saved value a {type(value).__name__}")
            if (value.shape, value.dtype, value.layout) != (target.shape, target.dtype, target.layout):
                raise self._mismatch(
                    path,
                    f"the target has shape {tuple(target.shape)}, dtype {target.dtype} and layout {target.layout}, the "
                    f"saved tensor has shape {tuple(value.shape)}, dtype {value.dtype} and layout {value.layout}",
                )

    def carry_out(self, builder: ValueBuilder) -> Any:
        """Put the loaded values into the target; returns it."""
        for container, key, pending in self._assignments:
            container[key] = self._value(pending, builder)
        return self._value(self._root, builder)

    def _value(self, pending: Any, builder: ValueBuilder) -> Any:
        if isinstance(pending, _Fresh):
            return builder.build(pending.node)
        if isinstance(pending, _Items):
            return tuple([self._value(item, builder) for item in pending])
        return pending

    def _visit(self, target: Any, node: Node, path: str) -> Any:
        """What will stand at ``path``: the target itself, :class:`_Items` of such, or a :class:`_Fresh`."""
        node = self._table.resolve(node)
        if isinstance(target, TensorsLike):
            target = target.target_for(node, self._table.resolve)
        if isinstance(target, torch.Tensor) and (isinstance(node, ShardedNode) or is_dtensor(target)):
            return self._visit_spread(target, node, path)
        if isinstance(target, torch.Tensor):
            return self._visit_tensor(target, node, path)
        if isinstance(target, MutableMapping) and isinstance(node, (DictNode, MapNode, OrderedDictNode)):
            return self._visit_mapping(target, node, path)
        if isinstance(target, list) and isinstance(node, (ListNode, TupleNode)):
            return self._visit_list(target, node, path)
        if type(target) is tuple and isinstance(node, (ListNode, TupleNode)):
            return self._visit_items(target, node, path)
        if _holds_tensor(target):
            # Replaced, it would leave whoever gave these tensors with what they held before.
            raise self._other_kind(path, target)
        self.fresh.extend(tensors_in(node, self._table, self._followed))
        return _Fresh(node)

    def _visit_mapping(
        self, target: MutableMapping[Any, Any], node: DictNode | MapNode | OrderedDictNode, path: str
    ) -> Any:
        if self._seen_before(target, node):
            return target
        saved = node.items if isinstance(node, DictNode) else self._keyed(node)
        for key, wanted in target.items():
            key_path = join_path(path, key)
            if key not in saved:
                self.missing.append(key_path)
                continue
            result = self._visit(wanted, saved[key], key_path)
            if result is not wanted:
                self._assignments.append((target, key, result))
        if self._check_keys is not None:
            self.unread += [join_path(path, key) for key in saved if key not in target]
        return target

    def _seen_before(self, target: Any, node: Node) -> bool:
        """Whether these two have met already: containers may stand in several places, and inside themselves."""
        pair = (id(target), id(node))
        if pair in self._met:
            return True
        self._met.add(pair)
        return False

    def _keyed(self, node: MapNode | OrderedDictNode) -> dict[Any, Node]:
        keys = ValueBuilder(self._table, _UnknownKey, _UnknownKey)
        return {keys.build(key): value for key, value in node.items}

    def _visit_list(self, target: list[Any], node: ListNode | TupleNode, path: str) -> Any:
        if not self._seen_before(target, node):
            self._assignments.append((target, slice(None), self._visit_items(target, node, path)))
        return target

    def _visit_items(self, target: list[Any] | tuple[Any, ...], node: ListNode | TupleNode, path: str) -> _Items:
        """What will stand in ``target``: the saved items, then those of its own for whose positions none was saved."""
        results = [
            self._visit(target[number] if number < len(target) else None, item, join_path(path, list_position(number)))
            for number, item in enumerate(node.items)
        ]
        for number in range(len(results), len(target)):
            self.missing.append(join_path(path, list_position(number)))
        return _Items((*results, *target[len(results) :]))

    def _visit_spread(self, target: torch.Tensor, node: Node, path: str) -> Any:
        if not isinstance(node, (TensorNode, ShardedNode)):
            raise self._mismatch(path, "the target is a tensor spread over ranks, the saved value is no plain tensor")
        self._require_same_form(target, node, path)
        self._require_memory(local_tensor(target) if is_dtensor(target) else target, path)
        self.spread.append((path, target, node))
        return target

    def _require_same_form(self, target: torch.Tensor, node: TensorNode | ShardedNode, path: str) -> None:
        saved_shape, saved_dtype = tuple(node.shape), torch_dtype(node.dtype)
        if tuple(target.shape) != saved_shape or target.dtype != saved_dtype:
            raise self._mismatch(
                path,
                f"the target has shape {tuple(target.shape)} and dtype {target.dtype}, "
                f"the saved tensor has shape {saved_shape} and dtype {saved_dtype}",
            )

    def _require_memory(self, target: torch.Tensor, path: str) -> None:
        if target.device.type == "meta":
            raise self._mismatch(path, "the target is on the meta device and has no memory to load into")
        if target.layout is not torch.strided or target.is_nested:
            raise self._mismatch(path, "the target is sparse or nested, the saved tensor is strided")
        if any(size > 1 and step == 0 for size, step in zip(target.shape, target.stride(), strict=True)):
            raise self._mismatch(path, "the target is expanded: several of its elements share one place in memory")

    def _visit_tensor(self, target: torch.Tensor, node: Node, path: str) -> Any:
        if isinstance(node, TensorNode):
            self._require_same_form(target, node, path)
            self._require_memory(target, path)
        elif not isinstance(node, OpaqueNode):
            raise self._mismatch(path, "the target is a tensor, the saved value is none")
        self.in_place.append((path, target, node))
        self._table.remember(node, target)
        return target

    def _other_kind(self, path: str, target: Any) -> TargetMismatchError:
        kind, saved = type(target).__name__, "value" if path else "state"
        return self._mismatch(path, f"the target is a {kind}, the saved {saved} is not, or only a pickle describes it")

    def _mismatch(self, path: str, what: str) -> TargetMismatchError:
        place, advice = (f"the key {path!r} of", "Pass None for this key") if path else ("", "Load without a target")
        return TargetMismatchError(
            f"cannot load {place} {self._path} into the target: {what}. Nothing has been changed. {advice} to get what "
            "was saved as it is.",
            path=self._path,
            tensor=path,
        )


def _holds_tensor(target: Any) -> bool:
    """Whether there is a tensor anywhere in these mappings, lists and tuples, which may hold themselves."""
    waiting, seen = [target], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
    return False


class _UnknownKey:
    """Stands for a key that only the pickle describes, or that is a tensor: no key of a target equals it."""

    def __init__(self, node: TensorNode | OpaqueNode) -> None:
        self.node = node
