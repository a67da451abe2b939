"""The checkpoint of several ranks read as one: spread tensors whole, or any part of them. Needs torch."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from lastgood import _events
from lastgood._contents.joint import join, own_paths
from lastgood._contents.reading import local_storage
from lastgood._memory import bytes_at, paused_garbage_collection
from lastgood.cli._tensors import SavedTensor, TensorSource
from lastgood.errors import CorruptCheckpointError, UncommittedCheckpointError
from lastgood.format.archive import Archive
from lastgood.format.commit import is_named_by, read_manifest
from lastgood.format.manifest import checkpoint_file
from lastgood.format.mesh import Box, Shape
from lastgood.format.nodes import Node, OpaqueNode, ShardedNode, TensorNode, sharded_nodes
from lastgood.types import RankInfo

if TYPE_CHECKING:
    import torch

    from lastgood._loading.per_rank import PerRankRules
    from lastgood._loading.spread import ManyFiles, Part


class WholeSource:
    """A committed checkpoint of several ranks, whose files are held open. A context manager.

    ``root`` describes all that the ranks hold as one state; ``own`` are the key paths of values that they do not have
    alike, of which ``root`` has one rank's. What is read is compared with its checksums.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        manifest = read_manifest(local_storage(), path)
        if manifest is None:
            raise UncommittedCheckpointError(f"{path} has no manifest: its save never finished.", path=path)
        self.world_size = manifest.world_size
        self._manifest = manifest
        self._many: dict[int, ManyFiles] = {}
        self._sharded_paths: dict[str, ShardedNode] | None = None
        with ExitStack() as opened:
            self._sources = [self._open(rank, opened) for rank in range(manifest.world_size)]
            files = [source.contents for source in self._sources]
            self._joint = join(files)
            self.own = own_paths(files, manifest)
            self._opened = opened.pop_all()

    def _open(self, rank: int, opened: ExitStack) -> TensorSource:
        source = opened.enter_context(TensorSource(checkpoint_file(self.path, rank)))
        if source.archive is None or source.contents.rank != rank or not is_named_by(self._manifest, source.archive):
            name = source.contents.path
            raise CorruptCheckpointError(
                f"{name} is not the file that the manifest of {self.path} names: it belongs to another save. 'lastgood "
                f"verify {self.path}' tells more.",
                path=name,
                rank=rank,
            )
        return source

    def __enter__(self) -> "WholeSource":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    @property
    def root(self) -> Node:
        """All that the ranks hold as one value."""
        return self._joint.root

    def tensor(self, node: Node) -> Node:
        """The tensor that a reference in ``root`` leads to; any other node as it is."""
        return self._joint.tensor(node)

    def first_path(self, node: Any) -> str:
        """The key path under which the object that a reference in ``root`` leads to came first."""
        return self._joint.first_path(node)

    def rank_source(self, rank: int) -> TensorSource:
        """The file of one rank."""
        return self._sources[rank]

    def spread_under(self, paths: Sequence[str]) -> list[ShardedNode]:
        """The spread tensors under these key paths."""
        if self._sharded_paths is None:
            self._sharded_paths = dict(sharded_nodes(self.root))
        return [self._sharded_paths[path] for path in paths]

    def load(self, target: Any = None, per_rank: "PerRankRules | None" = None) -> Any:
        """The state for a single process, on the CPU: everything, or the keys of ``target``, a nested dict.

        ``per_rank`` has rules for values that differ between ranks, as :meth:`lastgood.CheckpointReader.read` takes
        them; without one for each that is wanted, :class:`~lastgood.errors.RankMismatchError` is raised.
        """
        from lastgood._loading.checkpoint import Options, load_checkpoint

        options = Options("cpu", False, True, False, False, None, per_rank or {})
        with paused_garbage_collection(), _events.phase("read", self.path):
            return load_checkpoint(self.path, self._manifest, self._archive, RankInfo(0, 1), target, options)[0]

    def first_of_own(self) -> dict[str, Literal["first"]]:
        """Rules that take, of all values that ranks have of their own, that of rank 0."""
        return {exactly(path): "first" for path in sorted(self.own)}

    def opaque(self, node: OpaqueNode) -> Any:
        """A value that only a pickle describes; see :meth:`TensorSource.opaque`."""
        return self._sources[self._joint.rank(node)].opaque(node)

    def read_part(self, node: SavedTensor, box: Box) -> "torch.Tensor":
        """A part of a tensor, from the files that it lies in."""
        if isinstance(node, TensorNode):
            return self._sources[self._joint.rank(node)].read_part(node, box)
        return self._read_spread([node], [box.sizes], box.offsets)[0]

    def _read_spread(
        self, nodes: Sequence[ShardedNode], shapes: Sequence[Shape], start: Shape | None = None
    ) -> "list[torch.Tensor]":
        """The tensors, or of a single one the part of this shape from ``start`` on."""
        import torch

        from lastgood._loading.spread import read_spread
        from lastgood._loading.storages import torch_dtype

        made = [torch.empty(shape, dtype=torch_dtype(node.dtype)) for node, shape in zip(nodes, shapes, strict=True)]
        targets = [("", tensor, node) for tensor, node in zip(made, nodes, strict=True)]
        read_spread(targets, _Finder(self._files_for, start), check=True)
        return made

    def read_bytes(self, nodes: Sequence[SavedTensor]) -> list[bytes]:
        """The elements of each of these tensors in a row, as bytes."""
        found = [b""] * len(nodes)
        by_rank: dict[int, list[tuple[int, TensorNode]]] = {}
        spread: list[tuple[int, ShardedNode]] = []
        for number, node in enumerate(nodes):
            if isinstance(node, TensorNode):
                by_rank.setdefault(self._joint.rank(node), []).append((number, node))
            else:
                spread.append((number, node))
        for rank, wanted in by_rank.items():
            read = self._sources[rank].read_bytes([node for _, node in wanted])
            for (number, _), data in zip(wanted, read, strict=True):
                found[number] = data
        tensors = self._read_spread([node for _, node in spread], [node.shape for _, node in spread])
        for (number, _), tensor in zip(spread, tensors, strict=True):
            found[number] = bytes_at(tensor.data_ptr(), tensor.nbytes)
        return found

    def _files_for(self, node: ShardedNode) -> "ManyFiles":
        """What finds the parts of a tensor, beginning from the file that its node stands in."""
        rank = self._joint.rank(node)
        if rank not in self._many:
            from lastgood._loading.spread import ManyFiles

            self._many[rank] = ManyFiles(self._manifest, self._archive(rank), self._archive, self.path, ())
        return self._many[rank]

    def _archive(self, rank: int) -> Archive:
        archive = self._sources[rank].archive
        assert archive is not None  # or it would not have been opened
        return archive


class _Finder:
    """Finds the parts of spread tensors; with ``start``, for a target that is the part from there on."""

    def __init__(self, files_for: "Callable[[ShardedNode], ManyFiles]", start: Shape | None) -> None:
        self._files_for = files_for
        self._start = start

    def find(self, node: TensorNode | ShardedNode, region: Box) -> "list[Part]":
        assert isinstance(node, ShardedNode)  # it is asked for no others
        files, start = self._files_for(node), self._start
        if start is None:
            return files.find(node, region)
        there = Box(tuple([first + offset for first, offset in zip(start, region.offsets, strict=True)]), region.sizes)
        return [msgspec.structs.replace(part, box=_seen_from(start, part.box)) for part in files.find(node, there)]

    def archives_for(self, targets: Any, fresh: Any) -> list[Archive]:
        return []  # whoever opened them has checked them

    def verified_here(self) -> list[Archive]:
        return []


def _seen_from(start: Shape, box: Box) -> Box:
    return Box(tuple([offset - first for offset, first in zip(box.offsets, start, strict=True)]), box.sizes)


def exactly(path: str) -> str:
    """The pattern that matches a key path and no other."""
    return re.sub(r"([*?[])", r"[\1]", path)


def is_checkpoint_of_many(path: str) -> bool:
    """Whether ``path`` is the directory of a checkpoint that several ranks committed together."""
    manifest = read_manifest(local_storage(), path) if os.path.isdir(path) else None
    return manifest is not None and manifest.world_size > 1
