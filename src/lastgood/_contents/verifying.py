"""Checking every byte of a checkpoint and its commit record, and saying all that is wrong."""

from contextlib import closing

from lastgood._contents.checking import Findings, verify_archive, verify_torch_file
from lastgood._contents.manifest_check import ManifestCheck
from lastgood._contents.model import VerifyReport
from lastgood._contents.reading import local_storage, open_file, rank_files, require_file
from lastgood._loading.records import open_in_time
from lastgood._memory import paused_garbage_collection
from lastgood.errors import CorruptCheckpointError, StorageError
from lastgood.format.archive import Archive
from lastgood.format.commit import read_manifest
from lastgood.format.manifest import Manifest, absent_ranks, checkpoint_file, manifest_file
from lastgood.storage.base import StorageBackend

_MOST_ABSENT = 100
"""So many files that are not there are named."""


def verify_checkpoint(path: str, storage: StorageBackend | None = None) -> VerifyReport:
    """Check every byte of the file ``path``, or of the checkpoint directory ``path`` and its commit record.

    Damage is reported, not raised. Raises :class:`~lastgood.errors.CheckpointNotFoundError` where there is nothing to
    check.
    """
    storage = local_storage() if storage is None else storage
    findings = Findings(path)
    ranks = rank_files(storage, path)
    if not ranks:
        require_file(storage, path)
        _verify_file(storage, path, findings)
    else:
        _verify_directory(storage, path, ranks, findings)
    return findings.report()


def _verify_directory(storage: StorageBackend, path: str, ranks: dict[int, str], findings: Findings) -> None:
    manifest: Manifest | None = None
    manifest_is_there = storage.exists(manifest_file(path))
    try:
        manifest = read_manifest(storage, path)
    except (CorruptCheckpointError, StorageError) as error:
        findings.wrong(manifest_file(path), str(error))
    check = None if manifest is None else ManifestCheck(manifest, manifest_file(path), findings)
    world_size = manifest.world_size if manifest is not None else 1
    for rank, name in ranks.items():
        archive = _verify_file(storage, name, findings)
        if archive is None:
            if manifest is not None and not any(problem.file == name for problem in findings.problems):
                findings.wrong(name, "its manifest names a file of lastgood's, and lastgood did not write this one")
            continue
        index = archive.index
        if index.rank != rank:
            findings.wrong(name, f"it was written by rank {index.rank}: somebody renamed it")
        elif check is not None:
            check.add(archive)
        elif index.world_size > 1 and not index.independent and not manifest_is_there:
            findings.wrong(name, f"it is one of {index.world_size} ranks' and no manifest commits it")
        if manifest is None:
            world_size = max(world_size, index.world_size)
    for rank in absent_ranks(world_size, ranks, _MOST_ABSENT):
        findings.wrong(checkpoint_file(path, rank), "the file is not there")
    if check is not None:
        check.finish()


def _verify_file(storage: StorageBackend, path: str, findings: Findings) -> Archive | None:
    """Check one file; the archive if it is one of ours that could be opened."""
    findings.files += 1
    try:
        with closing(open_file(storage, path)) as file, paused_garbage_collection():
            findings.nbytes += file.size
            archive = open_in_time(file)
            if archive is None:
                verify_torch_file(file, findings)
            else:
                verify_archive(archive, findings)
            return archive
    except CorruptCheckpointError as error:
        findings.wrong(path, str(error), error.tensor)
    except StorageError as error:
        findings.wrong(path, str(error))
    return None
