"""What makes files a checkpoint, and what must not be written over.

A file that one rank wrote alone (or independently of the others) commits itself: it is whole or absent. The files of
several ranks are a checkpoint once the manifest names them all.
"""

import os
import time
from contextlib import closing

from lastgood.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UncommittedCheckpointError,
)
from lastgood.format.archive import Archive, open_archive
from lastgood.format.epoch import wait_for_lock
from lastgood.format.identity import read_identity
from lastgood.format.manifest import (
    MAX_MANIFEST_SIZE,
    InvalidManifestError,
    Manifest,
    checkpoint_file,
    decode_manifest,
    encode_manifest,
    manifest_file,
)
from lastgood.format.spec import crc32
from lastgood.format.vote import Ballot, ballot_of, not_of_this_save, tally
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend, StorageLock

_LONGEST_PAUSE_SECS = 0.25


def refuse_committed(storage: StorageInTime, path: str, rank: int, world_size: int, *, independent: bool) -> None:
    """Raise :class:`~lastgood.errors.CheckpointExistsError` if this save cannot replace what ``path`` holds.

    One rank's file is replaced in one step, and so is one of several independent ones by its successor. A checkpoint
    of several ranks cannot be, nor can several ranks, or another number of them, replace anything committed. What was
    never committed may be written over.
    """

    def look(plain: StorageBackend) -> str | None:
        return _obstacle_at(plain, path, rank, world_size, independent=independent)

    obstacle = storage.look_up(look, path)
    if obstacle is not None:
        ranks = "one rank" if world_size == 1 else f"{world_size} ranks"
        raise CheckpointExistsError(
            f"{path} already holds {obstacle}, which a save of {ranks} cannot replace in one step; nothing was "
            "written and it is untouched. Save to another path, or delete it first.",
            path=path,
            rank=rank,
            phase="begin",
        )


def _obstacle_at(storage: StorageBackend, path: str, rank: int, world_size: int, *, independent: bool) -> str | None:
    obstacle = "the committed checkpoint of several ranks" if storage.exists(manifest_file(path)) else None
    if obstacle is None:
        # The file of rank 0 too: it tells all ranks of a save the same.
        for name in dict.fromkeys((checkpoint_file(path, 0), checkpoint_file(path, rank))):
            obstacle = obstacle or _committed_by_itself(storage, name, world_size, independent=independent)
    return obstacle


def _committed_by_itself(storage: StorageBackend, name: str, world_size: int, *, independent: bool) -> str | None:
    """What the file is, if it must not be replaced; ``None`` if it may, or is not there."""
    alone = world_size == 1
    try:
        with closing(storage.open(name)) as file:
            identity = read_identity(file)
    except CheckpointNotFoundError:
        return None
    except CorruptCheckpointError:
        return None if alone else f"a damaged file ({os.path.basename(name)})"
    except StorageError:
        if alone:
            # What cannot even be read is no reason not to save; whether it can be replaced will be seen.
            return None
        raise
    if identity is None:
        return None if alone else f"a file that lastgood did not write ({os.path.basename(name)})"
    if identity.world_size > 1 and not identity.independent:
        return None  # without a manifest: left behind by a save that never finished
    if (identity.world_size, identity.independent) == (world_size, independent):
        return None
    if identity.independent:
        return f"independent files of {identity.world_size} ranks"
    return "the committed checkpoint of one rank"


def lock_for_writing(storage: StorageBackend, path: str, rank: int, timeout_secs: float) -> StorageLock:
    """The right to write the file of ``rank`` in the directory ``path``; waits for a writer that has it.

    That may be the checkpoint process of a trainer that has died, finishing what it was given: the save that was asked
    for later lands later. Raises :class:`~lastgood.errors.StorageError` after ``timeout_secs``.
    """
    name = checkpoint_file(path, rank)

    def timed_out() -> StorageError:
        return StorageError(
            f"another process has been writing {name} for {timeout_secs:g} s and goes on; nothing was written by "
            "this one, and what is there is untouched. Is a job from before a restart still running?",
            path=path,
            rank=rank,
            phase="lock",
        )

    return wait_for_lock(storage, name, timeout_secs, timed_out)


def publish_manifest(storage: StorageBackend, path: str, world_size: int, save_id: str) -> None:
    """Commit the checkpoint at ``path``; call it once every rank's file is durable under its name.

    ``save_id`` is that of rank 0's file, which publishes. Never replaces a manifest:
    :class:`~lastgood.errors.CheckpointExistsError`.
    """
    ballots = [_ballot_for(storage, path, rank, world_size) for rank in range(world_size)]
    tables = {digest: table for ballot in ballots for digest, table in ballot.tables.items()}
    manifest = tally([ballot.vote for ballot in ballots], tables.__getitem__, None)
    if manifest.save_id != save_id:
        raise not_of_this_save(checkpoint_file(path, 0), 0)
    storage.put_if_absent(manifest_file(path), encode_manifest(manifest))


def _ballot_for(storage: StorageBackend, path: str, rank: int, world_size: int) -> Ballot:
    """What this rank would vote; ranks that meet at a barrier do not."""
    name = checkpoint_file(path, rank)
    with closing(storage.open(name)) as file:
        archive = open_archive(file)
        if archive is None or (archive.index.rank, archive.index.world_size) != (rank, world_size):
            raise not_of_this_save(name, rank)
        return ballot_of(archive, archive.index.save_id)


def wait_for_manifest(storage: StorageBackend, path: str, rank: int, save_id: str, timeout_secs: float) -> None:
    """Return once rank 0 has published the manifest that names this rank's file of the save ``save_id``.

    Raises :class:`~lastgood.errors.UncommittedCheckpointError` when that does not happen in time, or the manifest
    turns out to be that of another save.
    """
    deadline = time.monotonic() + timeout_secs
    pause = 0.001
    while (manifest := read_manifest(storage, path)) is None:
        if time.monotonic() > deadline:
            raise _uncommitted(
                path, rank, f"rank 0 did not publish {manifest_file(path)} within {timeout_secs:g} s after the barrier"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECS)
    if rank >= manifest.world_size or manifest.files[rank].save_id != save_id:
        raise _uncommitted(path, rank, f"{manifest_file(path)} is that of another save (of another job?)")
    # It can be seen, but whoever published it may not have made that certain yet.
    storage.settle(path)


def _uncommitted(path: str, rank: int, what: str) -> UncommittedCheckpointError:
    return UncommittedCheckpointError(
        f"{what}; rank {rank}'s file is durable, but its checkpoint is not committed. See rank 0's error; checkpoints "
        "at other paths are untouched.",
        path=path,
        rank=rank,
        phase="commit",
    )


def read_manifest(storage: StorageBackend, path: str) -> Manifest | None:
    """The manifest of the checkpoint at ``path``, or ``None`` if it has none.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for one that is damaged.
    """
    name = manifest_file(path)
    try:
        with closing(storage.open(name)) as file:
            if file.size > MAX_MANIFEST_SIZE:
                raise InvalidManifestError(f"it has {file.size} bytes")
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
        return decode_manifest(bytes(data))
    except CheckpointNotFoundError:
        return None
    except InvalidManifestError as error:
        raise CorruptCheckpointError(f"{name} is damaged: {error}. Load an earlier checkpoint.", path=name) from error


def is_named_by(manifest: Manifest, archive: Archive) -> bool:
    """Whether this is the very file that the manifest names for its rank."""
    index = archive.index
    if index.rank >= manifest.world_size or index.world_size != manifest.world_size:
        return False
    entry = manifest.files[index.rank]
    return (entry.save_id, entry.size, entry.trailer_crc) == (
        index.save_id,
        archive.file.size,
        crc32(archive.trailer_bytes),
    )
