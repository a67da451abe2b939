"""The two sides of a comparison: files, or all files of a checkpoint as one state. Needs torch."""

import dataclasses
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lastgood._contents.joint import has_parts
from lastgood._contents.reading import local_storage, rank_files
from lastgood.cli._tensors import Source, TensorSource
from lastgood.cli._whole import WholeSource, is_checkpoint_of_many
from lastgood.errors import ConfigError
from lastgood.format.nodes import Node, OpaqueNode, ReferenceNode


@dataclass(frozen=True)
class Side:
    """What is compared: the values of one file, or of all files of a checkpoint as one state.

    ``own`` are the key paths of values that the ranks do not have alike; ``files`` opens those of a rank.
    """

    source: Source
    root: Node
    tensor: Callable[[Node], Node]
    first_path: Callable[[ReferenceNode], str]
    opaque: Callable[[OpaqueNode], Any]
    own: AbstractSet[str] = frozenset()
    files: tuple[TensorSource, ...] = ()
    is_joint: bool = False


def side_of_file(source: TensorSource) -> Side:
    """The values of one file."""
    references = source.references
    return Side(source, source.contents.root, references.tensor, references.first_path, source.opaque)


def side_of(path: str, stack: ExitStack) -> Side:
    """A checkpoint as one state, to be compared with that of several ranks."""
    if is_checkpoint_of_many(path):
        whole_source = stack.enter_context(WholeSource(path))
        files = tuple(whole_source.rank_source(rank) for rank in range(whole_source.world_size))
        return Side(
            whole_source,
            whole_source.root,
            whole_source.tensor,
            whole_source.first_path,
            whole_source.opaque,
            whole_source.own,
            files,
            is_joint=True,
        )
    names = rank_files(local_storage(), path) or {0: path}
    if len(names) > 1:
        raise ConfigError(
            f"{path} holds files of {len(names)} ranks that no manifest joins: compare them one by one.", path=path
        )
    source = stack.enter_context(TensorSource(next(iter(names.values()))))
    if has_parts(source.contents):
        raise ConfigError(
            f"{source.contents.path} is the file of one rank, with parts of tensors: compare the directories.",
            path=path,
        )
    return dataclasses.replace(side_of_file(source), files=(source,), is_joint=True)
