"""Writing checkpoints: one rank's file, and the commit that makes the files of all ranks one checkpoint."""

import abc
import os
import time
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from typing import Any

from lastgood import _events
from lastgood._image_writer import new_save_id, write_durably
from lastgood._threads import call_with_timeout
from lastgood.barriers import Barrier
from lastgood.capture import capture
from lastgood.errors import (
    BarrierTimeoutError,
    CheckpointExistsError,
    ConfigError,
    CorruptCheckpointError,
    UncommittedCheckpointError,
)
from lastgood.format.archive import open_archive
from lastgood.format.manifest import (
    MANIFEST_VERSION,
    Manifest,
    ManifestFile,
    checkpoint_file,
    encode_manifest,
    manifest_file,
)
from lastgood.format.spec import crc32
from lastgood.storage.base import StorageBackend, StreamedWrite
from lastgood.storage.local import LocalStorage
from lastgood.types import STATE_DICT, RankInfo


class WriterHook(abc.ABC):
    """Called around the commit of every checkpoint. A subclass need not call ``super().__init__``.

    ``path`` is the very string that was passed to ``save``; ``kwargs`` are its extra arguments. An exception from
    ``pre_commit`` fails the save and nothing is published; one from ``post_commit`` fails the save although the
    checkpoint is there.
    """

    @abc.abstractmethod
    def pre_commit(self, path: str, **kwargs: Any) -> None:
        """This rank's bytes are durable; the checkpoint is not published yet."""

    @abc.abstractmethod
    def post_commit(self, path: str, **kwargs: Any) -> None:
        """The checkpoint is published and durable."""


@dataclass
class CheckpointWriterConfig:
    """How long a write waits before it gives up, in seconds.

    ``write_barrier_timeout_secs``: for the other ranks. ``no_progress_timeout_secs``: for storage to take the next
    piece, or to make what it took durable.
    """

    write_barrier_timeout_secs: int = 600
    _: KW_ONLY
    no_progress_timeout_secs: float = 600.0


class CheckpointWriter:
    """Writes one rank's part of checkpoints: durable, atomic, checked by checksums.

    Order of a write: the rank's bytes are durable, ``pre_commit``, the barrier (once), the commit, ``post_commit``.
    With one rank, or several without a barrier, the commit is the publication of the rank's file; with a barrier it
    is the manifest that rank 0 writes once all ranks have arrived. A failed write leaves earlier checkpoints as they
    were.

    Subclasses may replace :meth:`write`, with the arguments in either order, and need not call ``super().__init__``.
    """

    def __init__(
        self,
        config: CheckpointWriterConfig,
        rank_info: RankInfo,
        barrier: Barrier | None = None,
        commit_hook: WriterHook | None = None,
        *,
        storage: StorageBackend | None = None,
    ) -> None:
        if not 0 <= rank_info.global_rank < rank_info.global_world_size:
            raise ConfigError(f"rank {rank_info.global_rank} of {rank_info.global_world_size} cannot be")
        self._config = config
        self._rank_info = rank_info
        self._barrier = barrier
        self._commit_hook = commit_hook
        self._storage = LocalStorage() if storage is None else storage

    def write(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> Future[None] | None:
        """Write ``state_dict`` to the directory ``path``; when this returns ``None``, the checkpoint is durable.

        ``kwargs`` reach the hooks; ``step``, if given and an int, is noted in the file as well. Raises
        :class:`~lastgood.errors.CheckpointExistsError` before anything is written when several ranks save onto a
        committed checkpoint, and :class:`~lastgood.errors.BarrierTimeoutError` when they do not all arrive.
        """
        rank = self._rank_info.global_rank
        with _events.phase("save", path, rank=rank):
            self._refuse_committed(path)
            with _events.phase("capture", path, rank=rank):
                step = kwargs.get("step")
                image = capture(state_dict).image(
                    save_id=new_save_id(),
                    rank=rank,
                    world_size=self._rank_info.global_world_size,
                    step=step if isinstance(step, int) else None,
                    independent=self._is_independent,
                )
            upload = write_durably(
                image,
                self._storage,
                checkpoint_file(path, rank),
                rank=rank,
                no_progress_timeout_secs=self._config.no_progress_timeout_secs,
            )
            try:
                self._commit(upload, path, kwargs)
            except BaseException:
                upload.abort()
                raise
        return None

    @property
    def _is_independent(self) -> bool:
        return self._rank_info.global_world_size > 1 and self._barrier is None

    @property
    def _needs_manifest(self) -> bool:
        return self._rank_info.global_world_size > 1 and self._barrier is not None

    def _refuse_committed(self, path: str) -> None:
        """A committed checkpoint of several ranks is never written over; a single rank's file is, atomically."""
        if self._storage.exists(manifest_file(path)):
            raise CheckpointExistsError(
                f"{path} already holds a committed checkpoint of several ranks; nothing was written and it is "
                "untouched. Save to another path, or delete it first.",
                path=path,
                rank=self._rank_info.global_rank,
            )

    def _commit(self, upload: StreamedWrite, path: str, kwargs: dict[str, Any]) -> None:
        rank = self._rank_info.global_rank
        if self._needs_manifest:
            # The file alone commits nothing: it may stand under its name before the others are ready.
            upload.commit()
        if self._commit_hook is not None:
            with _events.phase("pre_commit", path, rank=rank):
                self._commit_hook.pre_commit(path, **kwargs)
        if self._barrier is not None:
            self._wait_for_others(path, self._barrier)
        with _events.phase("commit", path, rank=rank):
            if not self._needs_manifest:
                upload.commit()
            elif rank == 0:
                self._publish_manifest(path)
            else:
                self._wait_for_manifest(path)
        if self._commit_hook is not None:
            with _events.phase("post_commit", path, rank=rank):
                self._commit_hook.post_commit(path, **kwargs)

    def _wait_for_others(self, path: str, barrier: Barrier) -> None:
        rank, timeout = self._rank_info.global_rank, self._config.write_barrier_timeout_secs

        def timed_out() -> BarrierTimeoutError:
            return BarrierTimeoutError(
                f"rank {rank} waited {timeout:g} s at the barrier of the checkpoint {path} and not all of "
                f"{self._rank_info.global_world_size} ranks came; the checkpoint is not committed, earlier ones are "
                "untouched.",
                path=path,
                rank=rank,
                phase="barrier",
            )

        with _events.phase("barrier", path, rank=rank):
            call_with_timeout(barrier.execute_barrier, timeout, timed_out, name="barrier")

    def _publish_manifest(self, path: str) -> None:
        files = [self._manifest_entry(path, rank) for rank in range(self._rank_info.global_world_size)]
        manifest = Manifest(MANIFEST_VERSION, files[0].save_id, len(files), files)
        self._storage.put_if_absent(manifest_file(path), encode_manifest(manifest))

    def _manifest_entry(self, path: str, rank: int) -> ManifestFile:
        name = checkpoint_file(path, rank)
        file = self._storage.open(name)
        try:
            archive = open_archive(file)
            if archive is None or archive.index.rank != rank:
                raise CorruptCheckpointError(
                    f"{name} is not the file that rank {rank} wrote; the checkpoint is not committed. Do all ranks "
                    "write to the same directory?",
                    path=name,
                    rank=rank,
                    phase="commit",
                )
            return ManifestFile(
                rank, os.path.basename(name), file.size, crc32(archive.trailer_bytes), archive.index.save_id
            )
        finally:
            file.close()

    def _wait_for_manifest(self, path: str) -> None:
        """Rank 0 has passed the barrier too and is writing it; until it is there, this save is not durable."""
        timeout = self._config.write_barrier_timeout_secs
        deadline = time.monotonic() + timeout
        pause = 0.001
        while not self._storage.exists(manifest_file(path)):
            if time.monotonic() > deadline:
                raise UncommittedCheckpointError(
                    f"rank 0 did not publish {manifest_file(path)} within {timeout:g} s after the barrier; this rank's "
                    "file is durable, but the checkpoint is not committed. See rank 0's error; earlier checkpoints are "
                    "untouched.",
                    path=path,
                    rank=self._rank_info.global_rank,
                    phase="commit",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def close(self) -> None:
        """Release what the writer holds; the writer itself holds nothing between writes."""
