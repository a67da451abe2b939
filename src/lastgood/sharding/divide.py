"""Dividing a state between the ranks that hold it: each takes the parts that it is to write, and asks nobody.

A state dict becomes one in which every tensor that is spread over ranks stands as :class:`LocalShards`. Who writes what
follows from names, shapes, meshes and ranks (:mod:`lastgood.format.sharding`).
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from lastgood._memory import paused_garbage_collection
from lastgood.errors import ConfigError, UnsupportedStateError
from lastgood.format.mesh import Layout, Placement, replica_mesh
from lastgood.format.nodes import join_path, list_position
from lastgood.format.sharding import Piece, written_pieces
from lastgood.sharding.dtensors import (
    Meshes,
    dtensor_class,
    local_tensor_without_grad,
    placements_of,
    require_usual_shards,
)
from lastgood.sharding.local_shards import LocalShards, ShardDescription, narrowed
from lastgood.types import RankInfo


class _UnknownFormError(Exception):
    """A tensor that is spread over ranks is not spread as it was in the last state, or was not there."""


class Divider:
    """Divides the states of one training, remembering how the last one was divided. One thread at a time.

    ``replicated``: patterns (as of :mod:`fnmatch`) of the key paths of plain tensors that are the same on all ranks.
    ``commits_together``: whether votes will join the parts; where they do not, nothing is divided.
    """

    def __init__(self, rank_info: RankInfo, replicated: Sequence[str] = (), *, commits_together: bool = True) -> None:
        if isinstance(replicated, str) or not all(isinstance(pattern, str) for pattern in replicated):
            raise ConfigError(f"replicated is {replicated!r}; give the patterns of key paths as a list of strings")
        if replicated and rank_info.global_world_size > 1 and not commits_together:
            raise ConfigError(
                "replicated needs ranks that commit together by voting, where the parts of all are joined and replicas "
                "compared: initialise the default process group on all ranks; leave barrier_config and rank_info out"
            )
        self._commits_together = commits_together
        self._rank = rank_info.global_rank
        self._world_size = rank_info.global_world_size
        self._replicated = tuple(replicated) if self._world_size > 1 else ()
        self._replica_mesh = replica_mesh(self._world_size)
        self._known: dict[str, tuple[Any, ShardDescription]] = {}
        self._matches: dict[str, bool] = {}

    def divide(self, state: Any) -> Any:
        """``state`` as this rank writes it; what holds no spread tensors stays the very same object.

        Raises :class:`~lastgood.errors.UnsupportedStateError` naming the key path of a tensor that cannot be divided.
        """
        if dtensor_class() is None and not self._replicated:
            return state
        with torch.no_grad(), paused_garbage_collection():
            try:
                known = self._known
                divided = self._divide(state, None)
                if self._known.keys() != known.keys():
                    raise _UnknownFormError
            except _UnknownFormError:
                # Which meshes belong together shows only in all tensors: all have to be described anew.
                self._known = {}
                distributed = dtensor_class()
                found = [] if distributed is None else list(_find(state, distributed))
                divided = self._divide(state, Meshes(found))
        return divided

    def _divide(self, state: Any, meshes: Meshes | None) -> Any:
        """Without ``meshes``, raises :class:`_UnknownFormError` for a tensor that is not as it was the last time."""
        distributed = dtensor_class()
        known, self._known = self._known, {}

        def part_of(tensor: torch.Tensor, path: str) -> Any:
            if distributed is not None and isinstance(tensor, distributed):
                return self._shards_of(tensor, path, meshes, known)
            if self._replicated and self._is_replicated(path) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                return self._replicas_of(tensor, path, known)
            return tensor

        return _Replacer(part_of).replaced(state, "")

    def _is_replicated(self, path: str) -> bool:
        matches = self._matches.get(path)
        if matches is None:
            matches = self._matches[path] = any(fnmatchcase(path, pattern) for pattern in self._replicated)
        return matches

    def _shards_of(
        self, tensor: Any, path: str, meshes: Meshes | None, known: dict[str, tuple[Any, ShardDescription]]
    ) -> LocalShards | torch.Tensor:
        local = _without_view_bits(local_tensor_without_grad(tensor))
        if self._world_size == 1 and tensor.device_mesh.size() == 1:
            return local
        form = (tensor.device_mesh, tensor.placements, tensor.shape, local.shape, tensor.dtype, _flags(tensor))
        before = known.get(path)
        if before is not None and before[0] == form:
            description = before[1]
        elif meshes is None:
            raise _UnknownFormError
        else:
            layout = self._layout_of(tensor, path, meshes)
            require_usual_shards(layout, self._rank, local)
            description = self._describe(layout, tensor)
        self._note(path, form, description)
        return LocalShards(description, _parts(local, description), source=tensor)

    def _layout_of(self, tensor: Any, path: str, meshes: Meshes) -> Layout:
        mesh, dimensions = meshes.describe(tensor.device_mesh, self._rank)
        placements = [Placement(None)] * len(mesh.shape)
        for dimension, placement in zip(dimensions, placements_of(tensor, path), strict=True):
            placements[dimension] = placement
        if self._rank not in mesh.positions or max(mesh.ranks) >= self._world_size:
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is spread over the ranks {list(mesh.ranks[:16])}, and this is rank "
                f"{self._rank} of a checkpoint of {self._world_size}; nothing was written. Every rank of a mesh has to "
                "save its part, and no other: make the checkpointer on all of them.",
                tensor=path,
                rank=self._rank,
            )
        if not self._commits_together and len(mesh.ranks) > 1:
            raise UnsupportedStateError(
                f"the tensor at key {path!r} is spread over ranks, and these ranks do not commit together by voting; "
                "nothing was written. Initialise the default process group on all ranks, and leave out barrier_config "
                "and rank_info.",
                tensor=path,
                rank=self._rank,
            )
        return Layout(path, tensor.dtype.itemsize, tuple(tensor.shape), mesh, tuple(placements))

    def _replicas_of(
        self, tensor: torch.Tensor, path: str, known: dict[str, tuple[Any, ShardDescription]]
    ) -> LocalShards | torch.Tensor:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return tensor
        form = (None, None, tensor.shape, tensor.dtype, _flags(tensor))
        before = known.get(path)
        if before is not None and before[0] == form:
            description = before[1]
        else:
            layout = Layout(path, tensor.dtype.itemsize, tuple(tensor.shape), self._replica_mesh, (Placement(None),))
            description = self._describe(layout, tensor)
        self._note(path, form, description)
        local = _without_view_bits(tensor.detach())
        return LocalShards(description, _parts(local, description), replica=local)

    def _describe(self, layout: Layout, tensor: torch.Tensor) -> ShardDescription:
        return ShardDescription(
            name=layout.name,
            mesh=layout.mesh,
            placements=tuple(map(str, layout.placements)),
            dtype=tensor.dtype,
            shape=layout.shape,
            flags=_flags(tensor),
            pieces=tuple(written_pieces(layout, self._rank)),
        )

    def _note(self, path: str, form: Any, description: ShardDescription) -> None:
        if path in self._known:
            raise UnsupportedStateError(
                f"two tensors that are spread over ranks have the same key path {path!r}, because a key has a dot in "
                "it; nothing was written. Rename one.",
                tensor=path,
            )
        self._known[path] = form, description


def _flags(tensor: torch.Tensor) -> str:
    return ("p" if isinstance(tensor, torch.nn.Parameter) else "") + ("g" if tensor.requires_grad else "")


def _without_view_bits(tensor: torch.Tensor) -> torch.Tensor:
    if not (tensor.is_neg() or tensor.is_conj()):
        return tensor
    return tensor.resolve_conj().resolve_neg()


def _parts(local: torch.Tensor, description: ShardDescription) -> list[torch.Tensor]:
    return [_part(local, piece) for piece in description.pieces]


def _part(local: torch.Tensor, piece: Piece) -> torch.Tensor:
    if piece.box.sizes == local.shape:
        return local.detach()  # an object of its own: what stands under two keys is described under both
    return narrowed(local, piece.local_offsets, piece.box.sizes)


def _require_plain_key(key: Any, path: str) -> None:
    """The key path is the tensor's name, by which ranks that never speak to each other have to mean the same."""
    if key is None or type(key) is bool or (type(key) is int and -(2**63) <= key < 2**63):
        return
    if type(key) is float and math.isfinite(key):
        return
    if type(key) is str and all(not 0xD800 <= ord(letter) <= 0xDFFF for letter in key):
        return
    raise UnsupportedStateError(
        f"a tensor that is spread over ranks stands under the key {join_path(path, key)!r}, of which a part is a "
        f"{type(key).__name__}; nothing was written. Use strings or numbers as the keys above such tensors.",
        tensor=join_path(path, key),
    )


def _find(value: Any, wanted: type, seen: set[int] | None = None) -> Iterator[Any]:
    """The values of a class in nested dicts, lists and tuples."""
    seen = set() if seen is None else seen
    if isinstance(value, wanted):
        yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, (dict, list, tuple, wanted)):
                yield from _find(item, wanted, seen)


class _Replacer:
    """Copies containers in which a tensor is replaced, and leaves all others as they are."""

    def __init__(self, replace: Callable[[torch.Tensor, str], Any]) -> None:
        self._replace = replace
        self._made: dict[int, Any] = {}
        self._open: set[int] = set()

    def replaced(self, value: Any, path: str) -> Any:
        """What stands in the place of ``value``; the same for a container that stands in several places."""
        if isinstance(value, torch.Tensor):
            return self._replace(value, path)
        kind = type(value)
        if kind is not dict and kind is not OrderedDict and kind is not list and kind is not tuple:
            return value
        number = id(value)
        if number in self._made:
            return self._made[number]
        if number in self._open:
            return value  # a state that holds itself: a copy could not be made of it piece by piece
        self._open.add(number)
        made = self._container(value, path)
        if kind is not tuple:  # those are described at each place where they stand, under its own name
            self._made[number] = made
        self._open.discard(number)
        return made

    def _container(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            items = {key: self.replaced(item, join_path(path, key)) for key, item in value.items()}
            replaced = [key for key, item in value.items() if items[key] is not item]
            if not replaced:
                return value
            for key in replaced:
                _require_plain_key(key, path)
            changed = copy.copy(value)  # an OrderedDict with its attributes
            changed.update(items)
            return changed
        results = [self.replaced(item, join_path(path, list_position(n))) for n, item in enumerate(value)]
        if all(new is old for new, old in zip(results, value, strict=True)):
            return value
        return results if isinstance(value, list) else tuple(results)
