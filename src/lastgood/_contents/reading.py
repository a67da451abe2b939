"""Opening a checkpoint to look at it: nothing of its tensors' data is read, and nothing of it is run."""

import dataclasses
import errno
import itertools
import math
from collections.abc import Iterator
from contextlib import closing

from lastgood._contents.model import Contents, FileContents, SpreadTensor, StoredBytes, TensorInfo
from lastgood._contents.shown import placement_text
from lastgood._contents.torch_files import describe_torch_file
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, open_in_time
from lastgood._memory import paused_garbage_collection
from lastgood.errors import CheckpointNotFoundError, StorageError
from lastgood.format.archive import Archive
from lastgood.format.commit import read_manifest
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.manifest import Manifest, absent_ranks, checkpoint_file, rank_of
from lastgood.format.nodes import Node, ShardedNode, TensorNode, walk_paths
from lastgood.format.references import References
from lastgood.format.spec import DTYPES
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend, StoredFile
from lastgood.storage.local import LocalStorage


def local_storage() -> StorageBackend:
    """Local storage whose calls end in time."""
    return StorageInTime(LocalStorage(), NO_PROGRESS_TIMEOUT_SECS)


def open_file(storage: StorageBackend, path: str) -> StoredFile:
    """A file whose reads are not watched one by one: there may be very many small ones."""
    return storage.open_unwatched(path) if isinstance(storage, StorageInTime) else storage.open(path)


def rank_files(storage: StorageBackend, path: str) -> dict[int, str]:
    """The files of ranks in the checkpoint directory ``path``, by rank."""
    ranks = sorted(rank for name in storage.list(path) if (rank := rank_of(name)) is not None)
    return {rank: checkpoint_file(path, rank) for rank in ranks}


def no_checkpoint(storage: StorageBackend, path: str) -> CheckpointNotFoundError:
    """The error for a path that is neither a file nor a checkpoint directory."""
    if not storage.exists(path):
        what = "there is no such file or directory"
    else:
        what = "the directory holds no file of the name checkpoint_<rank>.pt"
    return CheckpointNotFoundError(f"no checkpoint at {path}: {what}.", path=path)


def require_file(storage: StorageBackend, path: str) -> None:
    """Raise :class:`~lastgood.errors.CheckpointNotFoundError` unless ``path`` is a file; it is no rank's directory."""
    if not storage.exists(path):
        raise no_checkpoint(storage, path)
    try:
        storage.open(path).close()
    except StorageError as error:
        if error.errno != errno.EISDIR:
            raise
        raise no_checkpoint(storage, path) from error


def open_contents(path: str, storage: StorageBackend | None = None) -> Contents:
    """What is in the file ``path``, or in the files of the checkpoint directory ``path``.

    Reads indexes, pickles and directories of zips only. Files are closed when this returns. Raises
    :class:`~lastgood.errors.CheckpointNotFoundError`, or :class:`~lastgood.errors.CorruptCheckpointError` or
    :class:`~lastgood.errors.UnsafeCheckpointError` for a file that cannot be described.
    """
    storage = local_storage() if storage is None else storage
    ranks = rank_files(storage, path)
    if ranks:
        files = tuple(_named(describe_file(storage, name), rank) for rank, name in ranks.items())
        manifest = read_manifest(storage, path)
        return Contents(path, files, tuple(_notes(files, manifest)), manifest)
    require_file(storage, path)
    return Contents(path, (describe_file(storage, path),))


def _named(contents: FileContents, rank: int) -> FileContents:
    """A file of torch's does not say its rank: its name does."""
    return contents if contents.kind == "lastgood" else dataclasses.replace(contents, rank=rank)


def _notes(files: tuple[FileContents, ...], manifest: Manifest | None) -> Iterator[str]:
    several = [file for file in files if file.world_size > 1]
    if manifest is not None:
        for file in files:
            if not is_named(file.rank, file.save_id, file.nbytes, manifest):
                yield f"{file.path} is not the file that its manifest names: it belongs to another save"
    elif several and not all(file.independent for file in several):
        yield "it was never committed: its save was killed or failed, or is still under way"
    expected = manifest.world_size if manifest is not None else max(file.world_size for file in files)
    missing = absent_ranks(expected, {file.rank for file in files}, 10)
    if missing:
        yield f"the files of the ranks {', '.join(map(str, missing))} are not there"
    if len({file.save_id for file in several if not file.independent}) > 1 and manifest is None:
        # Ranks that vote share the id of their save; where they meet at a barrier, each file has its own.
        yield "its files have different save ids: they are of different saves, or of ranks that met at a barrier"


def is_named(rank: int, save_id: str | None, nbytes: int, manifest: Manifest) -> bool:
    """Whether a file is, by its save and its size, the one that the manifest names."""
    if rank >= manifest.world_size:
        return False
    entry = manifest.files[rank]
    return (entry.save_id, entry.size) == (save_id, nbytes)


def describe_file(storage: StorageBackend, path: str) -> FileContents:
    """What is in one file."""
    with closing(open_file(storage, path)) as file, paused_garbage_collection():
        archive = open_in_time(file)
        return describe_torch_file(file) if archive is None else describe_archive(archive)


def describe_archive(archive: Archive) -> FileContents:
    """What is in an open file of ours."""
    index, storages = archive.index, archive.layout.storages
    # What the ranks hold is compared by it.
    crcs = archive.record_crcs[FIRST_STORAGE:] if index.world_size > 1 else itertools.repeat(None)
    return FileContents(
        path=archive.file.path,
        nbytes=archive.file.size,
        kind="lastgood",
        root=index.root,
        storages=index.storages,
        places=[StoredBytes(record.data_offset, crc) for record, crc in zip(storages, crcs, strict=False)],
        byteorder=index.byteorder,
        rank=index.rank,
        world_size=index.world_size,
        independent=index.independent,
        step=index.step,
        saved_at=index.saved_at,
        metrics=index.metrics,
        save_id=index.save_id,
        meshes=index.meshes,
    )


def values(file: FileContents) -> Iterator[tuple[str, Node]]:
    """All values of a file by key path, with references to tensors resolved; other references stay as they are."""
    references = References(file.root)
    for path, node in walk_paths(file.root):
        yield path, references.tensor(node)


def tensors(file: FileContents) -> Iterator[TensorInfo]:
    """All tensors of a file, in order; one that comes under several keys comes several times."""
    first_paths: dict[int, str] = {}
    spread: dict[int, SpreadTensor] = {}
    references = References(file.root)
    for path, item in walk_paths(file.root):
        if isinstance(item, ShardedNode):
            placement = placement_text(item.placements, file.meshes[item.mesh])
            spread |= dict.fromkeys(map(id, item.items), SpreadTensor(path, item.dtype, item.shape, placement))
        node = references.tensor(item)
        if isinstance(node, TensorNode):
            first = first_paths.setdefault(id(node), path)
            yield TensorInfo(
                path=path,
                dtype=node.dtype,
                shape=node.shape,
                nbytes=math.prod(node.shape) * DTYPES[node.dtype].itemsize,
                storage=node.storage,
                flags=node.flags,
                first_path=first if first != path else None,
                part_of=spread.get(id(item)),
            )
