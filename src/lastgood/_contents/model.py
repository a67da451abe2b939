"""What is known of a checkpoint after looking at it: plain data, made without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lastgood.format.index import StorageEntry
from lastgood.format.manifest import Manifest
from lastgood.format.mesh import Mesh
from lastgood.format.nodes import Node

Kind = Literal["lastgood", "torch zip", "torch legacy"]


@dataclass(frozen=True)
class StoredBytes:
    """Where the bytes of one storage stand in the file, and their CRC-32 where that is known.

    A zip of torch's gives it; of a file of ours it is worked out if other ranks' files belong to it.
    """

    offset: int
    crc: int | None = None


@dataclass(frozen=True)
class FileContents:
    """One file: what it says about itself, its value as a node, and its storages by number.

    Storages are in the order in which the value names them; ``places`` says where their bytes stand. What a file of
    torch's does not say is ``None`` (rank 0 of 1). ``meshes`` are those that its sharded nodes number.
    """

    path: str
    nbytes: int
    kind: Kind
    root: Node
    storages: Sequence[StorageEntry]
    places: Sequence[StoredBytes]
    byteorder: str
    rank: int = 0
    world_size: int = 1
    independent: bool = False
    step: int | None = None
    saved_at: float | None = None
    metrics: dict[str, float | None] | None = None
    save_id: str | None = None
    meshes: Sequence[Mesh] = ()


@dataclass(frozen=True)
class Contents:
    """A checkpoint: its files, by rank, and its manifest if it has one.

    ``notes`` says in sentences what is not as it should be.
    """

    path: str
    files: tuple[FileContents, ...]
    notes: tuple[str, ...] = ()
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class SpreadTensor:
    """A tensor that is spread over ranks: its key, its global shape, and in words how it is placed."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    placement: str


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor under one key. ``nbytes`` is that of its elements, ``storage`` the number of what it is a view of.

    ``first_path`` is the key under which the very same tensor came first, if it comes under more than one; ``part_of``
    says of which spread tensor it is a part.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    storage: int
    flags: str
    first_path: str | None = None
    part_of: SpreadTensor | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, and the first tensor that it touches, if it touches one."""

    file: str
    tensor: str | None
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every byte found. ``files`` and ``nbytes`` count what was read.

    ``notes`` says what could not be checked, and why; that is no damage.
    """

    path: str
    files: int
    nbytes: int
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def is_good(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.problems
