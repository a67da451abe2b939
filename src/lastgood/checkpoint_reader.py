"""Reading checkpoints: one rank's file, after making sure that its save was committed."""

import contextlib
import os
from typing import Any

from lastgood import _events
from lastgood._loading.checkpoint import Options, load_checkpoint
from lastgood._loading.file import load_file
from lastgood._loading.merge import CheckKeys
from lastgood._loading.per_rank import PerRankRules
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, open_in_time
from lastgood._loading.storages import MapLocation
from lastgood._memory import paused_garbage_collection
from lastgood.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StorageError,
    UncommittedCheckpointError,
)
from lastgood.format.archive import Archive
from lastgood.format.commit import is_named_by, read_manifest
from lastgood.format.identity import read_identity
from lastgood.format.manifest import MANIFEST_VERSION, Manifest, ManifestFile, checkpoint_file, manifest_file
from lastgood.storage._descriptors import allow_descriptors
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend
from lastgood.storage.local import LocalStorage
from lastgood.types import STATE_DICT, RankInfo


class CheckpointReader:
    """Reads this rank's part of checkpoints; nothing from a file is executed."""

    def __init__(self, rank_info: RankInfo, *, storage: StorageBackend | None = None) -> None:
        self._rank_info = rank_info
        self._storage = StorageInTime(LocalStorage() if storage is None else storage, NO_PROGRESS_TIMEOUT_SECS)

    def read(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        map_location: MapLocation = None,
        verify: bool = True,
        verify_first: bool = False,
        verify_whole: bool = False,
        mmap: bool = False,
        allow_uncommitted: bool = False,
        check_keys: CheckKeys | None = None,
        per_rank: PerRankRules | None = None,
        **kwargs: Any,
    ) -> tuple[STATE_DICT, list[str]]:
        """The state saved in the directory ``path``, as this rank needs it, and the wanted keys that it does not hold.

        Without ``state_dict``, everything, newly made. With it, just its keys: into its tensors in place, newly made
        where it holds ``None``, other values replaced; the same dict is returned, and the dotted paths of keys that
        are missing (a key missing with all below it once). Lists and tuples are matched item by item; positions that
        were not saved are missing too. A target of another shape or dtype, or a container with tensors where something
        else was saved, raises :class:`~lastgood.errors.TargetMismatchError` before anything is changed.

        ``verify`` compares all that is read with its checksums; ``verify_first`` checks the whole file before any
        target is touched, ``verify_whole`` afterwards, without reading large tensors twice; ``mmap`` maps the file and
        checks nothing but its index; ``allow_uncommitted`` reads a file of several ranks whose save was never
        committed. ``check_keys`` is called with two lists of key paths before any target is touched, and may raise:
        those that are missing, and those that are saved in the wanted dicts and not wanted. ``map_location`` is that
        of ``torch.load``. Other arguments are accepted and ignored.

        Tensors that were spread over ranks (DTensor) are read into whatever stands in their place, spread in any way
        over any number of ranks, or whole; of the files of others just the parts that are wanted. Newly made, they are
        whole. All other values are those that this rank saved. Where another number of ranks saved, they are those that
        all ranks have alike; for values that differ between ranks ``per_rank`` names rules under patterns of key paths
        (see :data:`~lastgood._loading.per_rank.PerRankRule`), and without one
        :class:`~lastgood.errors.RankMismatchError` is raised before anything is changed.
        """
        options = Options(
            map_location, mmap, verify, verify_first, verify_whole, check_keys, {} if per_rank is None else per_rank
        )
        manifest = read_manifest(self._storage, path)
        if manifest is not None and self._concerns_many_files(manifest):
            return self._read_many(path, manifest, state_dict, options)
        return self._read_own(path, state_dict, options, allow_uncommitted=allow_uncommitted)

    def _concerns_many_files(self, manifest: Manifest) -> bool:
        return bool(manifest.tensors) or manifest.world_size != self._rank_info.global_world_size

    def _read_many(
        self, path: str, manifest: Manifest, state_dict: STATE_DICT | None, options: Options
    ) -> tuple[STATE_DICT, list[str]]:
        if options.mmap and (state_dict is not None or options.verify_first):
            raise ConfigError("mmap=True maps a file and reads nothing: it goes with neither a target nor verify_first")
        # A file takes two: one of them goes past the page cache. Where they are too few, opening says so.
        allow_descriptors(2 * manifest.world_size)
        with contextlib.ExitStack() as opened, paused_garbage_collection(), _events.phase("read", path):
            archives: dict[int, Archive] = {}

            def open_rank(rank: int) -> Archive:
                if rank not in archives:
                    archives[rank] = self._open_named(path, manifest, rank, opened)
                return archives[rank]

            return load_checkpoint(path, manifest, open_rank, self._rank_info, state_dict, options)

    def _open_named(self, path: str, manifest: Manifest, rank: int, opened: contextlib.ExitStack) -> Archive:
        """The file of a rank, which has to be the one that the manifest names."""
        file_path = checkpoint_file(path, rank)
        file = self._storage.open_unwatched(file_path)
        opened.callback(file.close)
        archive = open_in_time(file)
        if archive is None:
            raise self._not_named(path, file_path, rank)
        self._require_named(path, archive, manifest, rank)
        return archive

    def _read_own(
        self, path: str, state_dict: STATE_DICT | None, options: Options, *, allow_uncommitted: bool
    ) -> tuple[STATE_DICT, list[str]]:
        """Read one file that stands for itself: that of this rank, or the only one that there is."""
        file_path = checkpoint_file(path, self._rank_info.global_rank)
        if self._rank_info.global_world_size > 1 and not allow_uncommitted:
            alone = self._manifest_of_one(path)
            if alone is not None:
                return self._read_many(path, alone, state_dict, options)
        if not self._storage.exists(file_path):
            raise self._not_found(path)
        file = self._storage.open_unwatched(file_path)
        try:

            def admit(archive: Archive | None) -> None:
                if archive is None:
                    self._admit_foreign(path, file.path)
                else:
                    self._admit(path, archive, allow_uncommitted=allow_uncommitted)

            return load_file(
                file,
                state_dict,
                map_location=options.map_location,
                mmap=options.mmap,
                verify=options.verify,
                verify_first=options.verify_first,
                admit=admit,
                check_keys=options.check_keys,
                verify_whole=options.verify_whole,
            )
        finally:
            file.close()

    def _manifest_of_one(self, path: str) -> Manifest | None:
        """What the manifest would be of a checkpoint that one rank saved alone; ``None`` for any other."""
        if self._storage.exists(manifest_file(path)):
            return None
        name = checkpoint_file(path, 0)
        with contextlib.suppress(CheckpointNotFoundError), contextlib.closing(self._storage.open(name)) as file:
            found = read_identity(file)
            if found is not None and (found.rank, found.world_size) == (0, 1):
                entry = ManifestFile(0, os.path.basename(name), found.size, found.trailer_crc, found.save_id)
                return Manifest(MANIFEST_VERSION, found.save_id, 1, [entry])
        return None

    def _not_found(self, path: str) -> Exception:
        rank = self._rank_info.global_rank
        known: dict[str, Any] = {"path": path, "rank": rank, "phase": "read"}
        if self._is_file(path):
            return CheckpointNotFoundError(
                f"{path} is a file; a checkpoint is a directory with a file for each rank. To load one file, use "
                "lastgood.load.",
                **known,
            )
        there = [name for name in self._storage.list(path) if name.startswith("checkpoint_") and name.endswith(".pt")]
        if there:
            return CheckpointNotFoundError(
                f"the checkpoint {path} has no file for rank {rank}; it holds {', '.join(there)}.", **known
            )
        reason = "the directory holds no checkpoint" if self._storage.exists(path) else "there is no such directory"
        return CheckpointNotFoundError(
            f"Checkpoint file not found at {checkpoint_file(path, rank)}: {reason}.", **known
        )

    def _is_file(self, path: str) -> bool:
        try:
            self._storage.open(path).close()
        except (CheckpointNotFoundError, StorageError):
            return False
        return True

    def _admit(self, path: str, archive: Archive, *, allow_uncommitted: bool) -> None:
        """Refuse a file that is not this rank's, or whose save was not committed, or that is of another save."""
        index, rank = archive.index, self._rank_info.global_rank
        if index.rank != rank or rank >= index.world_size:
            raise CorruptCheckpointError(
                f"{archive.file.path} was written by rank {index.rank} of {index.world_size}, not by rank {rank}: "
                "somebody renamed it. Load an earlier checkpoint, or put the file back under its name.",
                path=archive.file.path,
                rank=rank,
            )
        alone = index.world_size == 1 or index.independent
        if allow_uncommitted or (alone and not self._storage.exists(manifest_file(path))):
            return
        self._require_named(path, archive, self._manifest(path, index.world_size), rank)

    def _require_named(self, path: str, archive: Archive, manifest: Manifest, rank: int) -> None:
        """Refuse a file that is not the very one that the manifest names."""
        if archive.index.rank != rank or not is_named_by(manifest, archive):
            raise CorruptCheckpointError(
                f"{archive.file.path} is not the file that the manifest of {path} names: it belongs to another save. "
                "Load an earlier checkpoint.",
                path=archive.file.path,
                rank=rank,
            )

    def _admit_foreign(self, path: str, file_path: str) -> None:
        """Refuse a file that lastgood did not write where a manifest says that it did."""
        if self._storage.exists(manifest_file(path)):
            raise self._not_named(path, file_path, self._rank_info.global_rank)

    def _not_named(self, path: str, file_path: str, rank: int) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{file_path} is not the file that the manifest of {path} names: lastgood did not write it, or it is "
            "damaged beyond recognition. Load an earlier checkpoint.",
            path=file_path,
            rank=rank,
        )

    def _manifest(self, path: str, world_size: int) -> Manifest:
        manifest = read_manifest(self._storage, path)
        if manifest is None:
            raise UncommittedCheckpointError(
                f"the checkpoint {path} was written by {world_size} ranks and never committed: it has no manifest. "
                "Load an earlier one, or pass allow_uncommitted=True to read this rank's file all the same.",
                path=path,
                rank=self._rank_info.global_rank,
            )
        if manifest.world_size != world_size:
            raise CorruptCheckpointError(
                f"{manifest_file(path)} names {manifest.world_size} ranks, the file of rank "
                f"{self._rank_info.global_rank} is one of {world_size}: they belong to different saves. "
                "Load an earlier checkpoint.",
                path=manifest_file(path),
                rank=self._rank_info.global_rank,
            )
        return manifest
