"""Reading checkpoints: one rank's file, after making sure that its save was committed."""

from typing import Any

from lastgood._loading.file import load_file
from lastgood._loading.merge import CheckKeys
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS
from lastgood._loading.values import MapLocation
from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, UncommittedCheckpointError
from lastgood.format.archive import Archive
from lastgood.format.commit import read_manifest
from lastgood.format.manifest import Manifest, checkpoint_file, manifest_file
from lastgood.format.spec import crc32
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
        **kwargs: Any,
    ) -> tuple[STATE_DICT, list[str]]:
        """The state saved by this rank in the directory ``path``, and the wanted keys that it does not hold.

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
        """
        rank = self._rank_info.global_rank
        file_path = checkpoint_file(path, rank)
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
                map_location=map_location,
                mmap=mmap,
                verify=verify,
                verify_first=verify_first,
                admit=admit,
                check_keys=check_keys,
                verify_whole=verify_whole,
            )
        finally:
            file.close()

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
        manifest = self._manifest(path, index.world_size)
        entry = manifest.files[rank]
        if (entry.save_id, entry.size) != (index.save_id, archive.file.size) or entry.trailer_crc != crc32(
            archive.trailer_bytes
        ):
            raise CorruptCheckpointError(
                f"{archive.file.path} is not the file that the manifest of {path} names: it belongs to another save. "
                "Load an earlier checkpoint.",
                path=archive.file.path,
                rank=rank,
            )

    def _admit_foreign(self, path: str, file_path: str) -> None:
        """Refuse a file that lastgood did not write where a manifest says that it did."""
        if self._storage.exists(manifest_file(path)):
            raise CorruptCheckpointError(
                f"{file_path} is not the file that the manifest of {path} names: lastgood did not write it, or it is "
                "damaged beyond recognition. Load an earlier checkpoint.",
                path=file_path,
                rank=self._rank_info.global_rank,
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
