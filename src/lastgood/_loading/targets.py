"""Tensors that are loaded into: which bytes may go straight to them, and what is said of them when a load fails."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lastgood._loading.storages import byte_range, torch_dtype
from lastgood.errors import CorruptCheckpointError, corrupt, listed
from lastgood.format.index import InvalidIndexError
from lastgood.format.nodes import (
    DictNode,
    MapNode,
    Node,
    OpaqueNode,
    OrderedDictNode,
    ShardedNode,
    TensorNode,
    element_span,
    keyed_children,
)
from lastgood.sharding.dtensors import is_dtensor


class TensorsLike:
    """Stands in a target for a dict that will be newly made, as that of an optimizer which has not stepped yet.

    ``like`` names a tensor for some of its keys: the tensors below such a key that have the same shape are spread over
    ranks as that tensor is. Everything else is made as it was saved.
    """

    def __init__(self, like: Mapping[Any, torch.Tensor]) -> None:
        self._like = like

    def target_for(self, node: Node, resolve: Callable[[Node], Node]) -> Any:
        """The target that this stands for where ``node`` was saved."""
        if not isinstance(node, (DictNode, MapNode, OrderedDictNode)):
            return None
        return {
            key: self._values_target(self._like.get(key), resolve(value), resolve)
            for key, value in keyed_children(node)
        }

    def _values_target(self, like: torch.Tensor | None, node: Node, resolve: Callable[[Node], Node]) -> Any:
        if like is None or not is_dtensor(like) or not isinstance(node, (DictNode, MapNode, OrderedDictNode)):
            return None
        target = {}
        for key, child in keyed_children(node):
            value = resolve(child)
            is_alike = isinstance(value, (TensorNode, ShardedNode)) and tuple(value.shape) == tuple(like.shape)
            target[key] = _empty_like(like, value.dtype) if is_alike else None  # type: ignore[union-attr]
        return target


def _empty_like(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    with torch.no_grad():
        return torch.empty_like(tensor, dtype=torch_dtype(dtype), requires_grad=False)


def split_targets(
    targets: Sequence[tuple[torch.Tensor, TensorNode | OpaqueNode]],
) -> tuple[list[tuple[torch.Tensor, TensorNode]], list[tuple[torch.Tensor, TensorNode | OpaqueNode]]]:
    """The targets whose memory the saved bytes can be read straight into, at the same time, and in order all others.

    A target that shares memory with another one is among the others, so that the last one wins, as with assignments;
    only of targets that are the same memory for the same saved bytes (tied weights) one is enough, as long as nothing
    else overlaps them: what lies between two of them in the order must not undo the last.
    """
    direct: dict[int, tuple[torch.Tensor, TensorNode]] = {}
    spans: list[tuple[int, int, int]] = []
    same: dict[tuple[int, int, int, int], list[int]] = {}
    repeated: dict[int, list[int]] = {}
    others: set[int] = set()
    for number, (tensor, node) in enumerate(targets):
        if not _has_address(tensor):
            others.add(number)
            continue
        count = tensor.numel()
        if count == 0:
            continue  # there is nothing to load
        address = tensor.data_ptr()
        span = count if tensor.is_contiguous() else element_span(tuple(tensor.shape), tensor.stride())
        if type(node) is TensorNode and _is_read_into(tensor, node):
            place = (address, node.storage, *byte_range(node))
            if place in same:
                same[place].append(number)
                continue
            same[place] = repeated[number] = []
            direct[number] = (tensor, node)
        else:
            others.add(number)
        spans.append((address, address + span * tensor.itemsize, number))
    for number in _overlapping(spans):
        if direct.pop(number, None) is not None:
            others.update([number, *repeated[number]])
    return list(direct.values()), [targets[number] for number in sorted(others)]


def _overlapping(spans: list[tuple[int, int, int]]) -> set[int]:
    """The numbers of the spans (start, end, number) that overlap another one."""
    spans.sort()
    found: set[int] = set()
    furthest, owner = 0, -1
    for start, end, number in spans:
        if start < furthest:
            found |= {number, owner}
        if end > furthest:
            furthest, owner = end, number
    return found


def _is_read_into(target: torch.Tensor, node: TensorNode) -> bool:
    """Whether the saved bytes, as they are, are the target's bytes."""
    if target.is_conj() or target.is_neg() or "c" in node.flags or "n" in node.flags:
        return False
    stride = target.stride()
    if stride != node.stride and any(
        size > 1 and step != saved for size, step, saved in zip(node.shape, stride, node.stride, strict=True)
    ):
        return False
    # Dense: a gap between the target's elements belongs to somebody else.
    return element_span(node.shape, node.stride) == target.numel()


def _has_address(tensor: torch.Tensor) -> bool:
    is_plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return is_plain and tensor.device.type == "cpu" and tensor.layout is torch.strided


def in_pieces(target: torch.Tensor, node: TensorNode, largest: int) -> Iterator[tuple[torch.Tensor, TensorNode]]:
    """The same load in parts of at most ``largest`` saved bytes each, where the target can be divided."""
    start, end = byte_range(node)
    if end - start <= largest or type(target) not in (torch.Tensor, torch.nn.Parameter):
        yield target, node
        return
    # Along the dimension in which the saved elements lie furthest apart.
    step, dimension = max((step, number) for number, step in enumerate(node.stride) if node.shape[number] > 1)
    itemsize = (end - start) // element_span(node.shape, node.stride)
    length = node.shape[dimension]
    count = min(max(1, largest // (step * itemsize)), length - 1)
    for first in range(0, length, count):
        size = min(count, length - first)
        shape = (*node.shape[:dimension], size, *node.shape[dimension + 1 :])
        part = TensorNode(node.storage, node.dtype, node.offset + first * step, shape, node.stride, node.flags)
        with torch.no_grad():
            inner = target.detach().narrow(dimension, first, size)
        yield from in_pieces(inner, part, largest)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the values, unseen by autograd but for the version counter."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.copy_(source)


@contextmanager
def naming_undefined_targets(path: str, targets: list[str]) -> Iterator[None]:
    """Around the part of a load that changes targets: whatever goes wrong in it says which may be half changed."""
    note = f"These targets may hold partly read data and must be loaded again before use: {listed(targets)}."
    try:
        yield
    except (CorruptCheckpointError, InvalidIndexError) as error:
        if isinstance(error, InvalidIndexError):
            error = corrupt(path, f"its index describes what cannot be: {error}")
        if not targets:
            raise error from error.__cause__
        raise CorruptCheckpointError(
            f"{error} {note}", undefined_targets=tuple(targets), path=error.path, tensor=error.tensor
        ) from error
    except BaseException as error:
        if targets:
            error.add_note(note)
        raise
