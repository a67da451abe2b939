"""What verbs look up on disk beside the catalog. Nothing here changes anything."""

import os
from contextlib import closing
from typing import Annotated, TypeAlias

import msgspec
import typer

from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from lastgood.format.identity import FileIdentity, read_identity
from lastgood.format.manifest import MANIFEST_NAME, rank_of
from lastgood.manager.catalog import step_of
from lastgood.storage._durable_write import is_temporary
from lastgood.storage._file_lock import is_held, is_lock
from lastgood.storage.base import StorageBackend
from lastgood.storage.file_ops import FileOps, OsFileOps

Root: TypeAlias = Annotated[str, typer.Argument(metavar="ROOT", help="The directory that a run saves to.")]


def require_directory(root: str) -> None:
    """Raise :class:`~lastgood.errors.CheckpointNotFoundError` if there is no such directory."""
    if not os.path.exists(root):
        raise CheckpointNotFoundError(f"there is no directory {root}", path=root)
    if not os.path.isdir(root):
        raise CheckpointNotFoundError(f"{root} is a file, not the directory that a run saves to", path=root)


def is_one_checkpoint(storage: StorageBackend, path: str) -> bool:
    """Whether this is a checkpoint (its directory, or one file), and not the root of a run."""
    if os.path.isfile(path):
        return True
    names = storage.list(path)
    if MANIFEST_NAME in names or any(rank_of(name) is not None for name in names):
        return True
    return step_of(os.path.basename(os.path.normpath(path))) is not None and not any(map(_is_step, names))


def _is_step(name: str) -> bool:
    return step_of(name) is not None


def identity_of(storage: StorageBackend, path: str) -> FileIdentity | None:
    """Whose file this is; ``None`` if it is not there, not lastgood's, or cannot be read."""
    try:
        with closing(storage.open(path)) as file:
            return read_identity(file)
    except (CheckpointNotFoundError, CorruptCheckpointError, StorageError):
        return None


def disk_size(path: str) -> int:
    """The bytes of a file, or of everything in a directory; what cannot be looked at counts nothing."""
    if not os.path.isdir(path):
        try:
            return os.stat(path).st_size
        except OSError:
            return 0
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except OSError:
                continue
    return total


class WriterTrace(msgspec.Struct, frozen=True):
    """A temporary or a lock: what a writer has in a directory while it works, or leaves there when it is killed.

    ``is_held`` is ``None`` where that cannot be told.
    """

    path: str
    is_lock: bool
    is_held: bool | None


def writer_traces(directory: str, ops: FileOps | None = None) -> list[WriterTrace]:
    """The temporaries and locks in a directory, and whether their writers live. What is not there has none."""
    ops = OsFileOps() if ops is None else ops
    try:
        names = sorted(ops.list_directory(directory))
    except OSError:
        return []
    return [
        WriterTrace(path, is_lock(name), is_held(ops, path))
        for name in names
        if is_temporary(name) or is_lock(name)
        for path in [os.path.join(directory, name)]
    ]
