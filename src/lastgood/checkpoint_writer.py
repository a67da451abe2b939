"""Writing checkpoints: one rank's file, and the commit that makes the files of all ranks one checkpoint."""

import abc
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from lastgood import _events
from lastgood._coordination.calls import Coordination
from lastgood._image_writer import new_save_id, write_durably
from lastgood._staged_image import StagedImage
from lastgood._threads import call_with_timeout, start_or_do
from lastgood.errors import BarrierTimeoutError, CheckpointExistsError, ConfigError, StagingError
from lastgood.format.commit import lock_for_writing, publish_manifest, refuse_committed, wait_for_manifest
from lastgood.format.index_head import IndexHead, noted_in_head
from lastgood.format.manifest import checkpoint_file, manifest_file
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.base import StorageBackend, StreamedWrite
from lastgood.storage.local import LocalStorage
from lastgood.types import STATE_DICT, RankInfo

if TYPE_CHECKING:
    from lastgood._coordination.together import Coordinator, ReplicaChecksums, SaveTogether  # imports torch
    from lastgood.barriers import Barrier  # so does this
    from lastgood.sharding.divide import Divider  # and this

_WriteFile = Callable[[IndexHead, str], StreamedWrite]
"""Brings one rank's file to storage, under a head and a path; what comes back waits to be committed."""

SAVE_CALL = "_save_call"
"""The keyword under which a trainer passes its :class:`~lastgood._coordination.calls.SaveCall` on; no hook sees it."""

_LONGEST_TIMEOUT_SECS = 365 * 86400.0
_making_coordinators = threading.Lock()


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
    With one rank, or several independent ones, the commit is the publication of the rank's file. With several and a
    barrier it is the manifest, which rank 0 writes once all ranks have arrived; their files stand under their names
    before that, and are no checkpoint if it never comes. A failed write leaves earlier checkpoints as they were, and
    tells the other ranks at once, where the barrier has a way to.

    With ``coordination`` the ranks need no barrier: in its place they vote, each for the file that it has published.

    Of a tensor that is spread over ranks (DTensor), each rank writes its part, and of replicas exactly one.
    ``replicated`` are the patterns (as of :mod:`fnmatch`) of the key paths of plain tensors that are the same on all
    ranks: each rank writes a part of them, and a save fails, naming them, where they are not the same.

    Subclasses may replace :meth:`write`, with the arguments in either order, and need not call ``super().__init__``.
    """

    is_in_hook = False
    """Whether code of the user's is running, whose waits nobody bounds."""

    _barrier: "Barrier | None" = None
    _coordination: Coordination | None = None
    _coordinator: "Coordinator | None" = None
    _divider: "Divider | None" = None

    def __init__(
        self,
        config: CheckpointWriterConfig,
        rank_info: RankInfo,
        barrier: "Barrier | None" = None,
        commit_hook: WriterHook | None = None,
        *,
        storage: StorageBackend | None = None,
        coordination: Coordination | None = None,
        replicated: Sequence[str] = (),
    ) -> None:
        if not 0 <= rank_info.global_rank < rank_info.global_world_size:
            raise ConfigError(f"rank {rank_info.global_rank} of {rank_info.global_world_size} cannot be")
        for name in ("write_barrier_timeout_secs", "no_progress_timeout_secs"):
            if not 0 < getattr(config, name) <= _LONGEST_TIMEOUT_SECS:
                raise ConfigError(f"{name} is {getattr(config, name)!r}; it has to be above 0 s and at most a year")
        self._config = config
        self._rank_info = rank_info
        self._barrier = barrier
        self._commit_hook = commit_hook
        self._storage = LocalStorage() if storage is None else storage
        self._replicated = replicated
        if coordination is not None:
            _check_coordination(coordination, rank_info, barrier)
            self._coordination = coordination
            if "torch" in sys.modules:
                self._own_coordinator()
            else:
                # A checkpoint process is ready before that: importing torch may take longer than it has got to start.
                start_or_do(self._make_coordinator_early, name="lastgood-coordinator")
        if replicated:
            self._own_divider()  # refuses them where replicas could not be compared

    def write(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> Future[None] | None:
        """Write ``state_dict`` to the directory ``path``; when this returns ``None``, the checkpoint is durable.

        ``kwargs`` reach the hooks; ``step`` (an int), ``saved_at`` (a float: seconds since 1970) and ``metrics`` (a
        dict of numbers under strings), if given, are noted in the file as well. Raises
        :class:`~lastgood.errors.CheckpointExistsError` before anything is written when ``path`` holds a committed
        checkpoint that this save cannot replace in one step (only one rank's can, by one rank's), and
        :class:`~lastgood.errors.BarrierTimeoutError` when not all ranks arrive.
        """
        rank = self._rank_info.global_rank
        replicas: list[Any] = []

        def prepare() -> _WriteFile:
            from lastgood.capture import capture  # imports torch, which a checkpoint process does without

            with _events.phase("capture", _directory(path), rank=rank):
                captured = capture(self._own_divider().divide(state_dict))
            replicas.extend(captured.replicas)
            return lambda head, file_path: write_durably(
                captured.image(head), self._storage, file_path, rank=rank, **self._patience
            )

        def replica_checksums() -> list[int]:
            from lastgood.sharding.checksums import checksum

            return [checksum(replica) for _, replica in replicas]

        self._save(path, prepare, kwargs, replica_checksums)
        return None

    def _own_divider(self) -> "Divider":
        if self._divider is None:
            from lastgood.sharding.divide import Divider

            self._divider = Divider(self._rank_info, self._replicated, commits_together=self._coordination is not None)
        return self._divider

    def write_staged(self, path: str, staged: StagedImage, /, **kwargs: Any) -> None:
        """Like :meth:`write`, from an image in shared memory; begins before it is all there.

        Raises what staging failed with if it does; nothing is published then.
        """
        rank = self._rank_info.global_rank

        def prepare() -> _WriteFile:
            return lambda head, file_path: staged.write_durably(
                head, self._storage, file_path, rank=rank, **self._patience
            )

        self._save(path, prepare, kwargs, lambda: staged.replica_checksums)

    def abandon(self, path: str, error: BaseException, /, **kwargs: Any) -> None:
        """Tell the other ranks, who expect this save, why it cannot be begun here.

        In the place of a call of :meth:`write` with these ``kwargs``. Writes nothing; where the ranks have no way to
        tell each other, does nothing.
        """
        call = kwargs.pop(SAVE_CALL, None)
        coordinator = self._own_coordinator()
        together = None if coordinator is None else coordinator.save(call, _directory(path), self._storage_in_time)
        self._tell_others(error, together)

    def _save(
        self,
        path: str,
        prepare: Callable[[], _WriteFile],
        kwargs: dict[str, Any],
        replica_checksums: "ReplicaChecksums | None" = None,
    ) -> None:
        directory, rank = _directory(path), self._rank_info.global_rank
        call = kwargs.pop(SAVE_CALL, None)
        coordinator = self._own_coordinator()
        together = None if coordinator is None else coordinator.save(call, directory, self._storage_in_time)
        save_id = new_save_id() if together is None else together.save_id
        with _events.phase("save", directory, rank=rank), contextlib.ExitStack() as held:
            try:
                upload = self._prepare(path, save_id, prepare, kwargs, together, held)
            except BaseException as error:
                self._tell_others(error, together)
                raise
            try:
                if together is None:
                    self._wait_for_others(directory)
                    self._commit(upload, directory, save_id)
                else:
                    self._commit_together(together, directory, replica_checksums)
            except BaseException as error:
                upload.abort()
                if together is not None:
                    together.give_up(error)
                raise
            if self._commit_hook is not None:
                with _events.phase("post_commit", directory, rank=rank), self._in_hook():
                    self._commit_hook.post_commit(path, **kwargs)

    @contextlib.contextmanager
    def _in_hook(self) -> Iterator[None]:
        self.is_in_hook = True
        try:
            yield
        finally:
            self.is_in_hook = False

    @property
    def _patience(self) -> dict[str, float]:
        return {"no_progress_timeout_secs": self._config.no_progress_timeout_secs}

    @property
    def _is_independent(self) -> bool:
        return self._rank_info.global_world_size > 1 and not self._needs_manifest

    @property
    def _needs_manifest(self) -> bool:
        commits_together = self._barrier is not None or self._coordination is not None
        return self._rank_info.global_world_size > 1 and commits_together

    @property
    def _storage_in_time(self) -> StorageInTime:
        return StorageInTime(self._storage, self._config.no_progress_timeout_secs)

    def _prepare(
        self,
        path: str,
        save_id: str,
        prepare: Callable[[], _WriteFile],
        kwargs: dict[str, Any],
        together: "SaveTogether | None",
        held: contextlib.ExitStack,
    ) -> StreamedWrite:
        """All that this rank does before it meets the others; ``held`` is let go when the save is over."""
        directory = _directory(path)
        upload = self._write_file(directory, save_id, prepare, kwargs, together, held)
        try:
            if self._commit_hook is not None:
                with _events.phase("pre_commit", directory, rank=self._rank_info.global_rank), self._in_hook():
                    self._commit_hook.pre_commit(path, **kwargs)
            if together is not None:
                with together.publication():
                    self._publish_file(upload, directory)
            elif self._needs_manifest:
                self._publish_file(upload, directory)
        except BaseException:
            upload.abort()
            raise
        return upload

    def _write_file(
        self,
        directory: str,
        save_id: str,
        prepare: Callable[[], _WriteFile],
        kwargs: dict[str, Any],
        together: "SaveTogether | None",
        held: contextlib.ExitStack,
    ) -> StreamedWrite:
        rank, world_size = self._rank_info.global_rank, self._rank_info.global_world_size
        self.refuse_committed(directory)
        write_file = prepare()  # before there is anything on disk: a state that cannot be saved leaves nothing
        if not self._needs_manifest or (together is not None and rank == 0):
            # Where a manifest commits, rank 0's at most: two jobs could each hold one rank's lock and wait for the
            # other's. The save ids in the files keep them from being committed together.
            lock = lock_for_writing(self._storage_in_time, directory, rank, self._config.no_progress_timeout_secs)
            held.callback(lock.release)
        if together is not None and rank == 0:
            self.refuse_committed(directory)  # by whoever had the lock until now
            together.begin()
        head = IndexHead(
            save_id=save_id,
            rank=rank,
            world_size=world_size,
            independent=self._is_independent,
            **noted_in_head(kwargs),
        )
        return write_file(head, checkpoint_file(directory, rank))

    def refuse_committed(self, path: str) -> None:
        """Raise :class:`~lastgood.errors.CheckpointExistsError` if this writer cannot replace what ``path`` holds."""
        rank_info = self._rank_info
        refuse_committed(
            self._storage_in_time,
            _directory(path),
            rank_info.global_rank,
            rank_info.global_world_size,
            independent=self._is_independent,
        )

    def _publish_file(self, upload: StreamedWrite, directory: str) -> None:
        """Give this rank's file its name, which commits nothing: the manifest will."""
        rank = self._rank_info.global_rank
        if self._storage_in_time.exists(manifest_file(directory)):
            raise CheckpointExistsError(
                f"{directory} was committed by another job while rank {rank} was saving to it; that checkpoint is "
                "untouched. Two jobs must not save to the same path: is one left over from before a restart?",
                path=directory,
                rank=rank,
                phase="publish",
            )
        with _events.phase("publish", directory, rank=rank):
            upload.commit()

    def _tell_others(self, error: BaseException, together: "SaveTogether | None") -> None:
        if together is not None:
            together.give_up(error)
            return
        # A barrier of the user's own may have nothing but execute_barrier.
        abandon = getattr(self._barrier, "abandon", None)
        if abandon is not None and self._rank_info.global_world_size > 1:
            abandon(f"{type(error).__name__}: {error}")

    def _wait_for_others(self, directory: str) -> None:
        rank, timeout, barrier = self._rank_info.global_rank, self._config.write_barrier_timeout_secs, self._barrier
        if barrier is None:
            return

        def timed_out() -> BarrierTimeoutError:
            return BarrierTimeoutError(
                f"rank {rank} waited {timeout:g} s at the barrier of the checkpoint {directory} and not all of "
                f"{self._rank_info.global_world_size} ranks came; the checkpoint is not committed, earlier ones are "
                "untouched.",
                path=directory,
                rank=rank,
                phase="barrier",
            )

        with _events.phase("barrier", directory, rank=rank):
            call_with_timeout(barrier.execute_barrier, timeout, timed_out, name="barrier")

    def _commit(self, upload: StreamedWrite, directory: str, save_id: str) -> None:
        rank, storage = self._rank_info.global_rank, self._storage_in_time
        with _events.phase("commit", directory, rank=rank):
            if not self._needs_manifest:
                upload.commit()
            elif rank == 0:
                publish_manifest(storage, directory, self._rank_info.global_world_size, save_id)
            else:
                # Rank 0 has passed the barrier too. Until its manifest is there, this save is not durable.
                timeout = self._config.write_barrier_timeout_secs
                wait_for_manifest(storage, directory, rank, save_id, timeout)

    def _own_coordinator(self) -> "Coordinator | None":
        if self._coordination is None:
            return None
        with _making_coordinators:
            if self._coordinator is None:
                from lastgood._coordination.together import Coordinator

                self._coordinator = Coordinator(self._coordination, self._config.write_barrier_timeout_secs)
            return self._coordinator

    def _make_coordinator_early(self) -> None:
        try:
            self._own_coordinator()
        except Exception as error:  # the first save tries again, and raises what is wrong
            _events.logger.info("the ranks' coordination is not ready yet: %s", error)

    def _commit_together(
        self, together: "SaveTogether", directory: str, replica_checksums: "ReplicaChecksums | None"
    ) -> None:
        rank = self._rank_info.global_rank
        with _events.phase("barrier", directory, rank=rank):
            together.vote(replica_checksums)
        with _events.phase("commit", directory, rank=rank):
            together.commit()

    def depart(self) -> None:
        """The trainer has ended: no more saves of this rank will come, and the others need not wait for any."""
        coordinator = self._own_coordinator()
        if coordinator is not None:
            coordinator.depart()
        else:
            self._tell_others(StagingError("the trainer is gone, and will ask for no more saves", phase="stage"), None)

    def close(self) -> None:
        """Release what the writer holds; ranks that vote may wait a moment for others that have not heard yet."""
        if self._coordinator is not None:
            self._coordinator.close()


def make_standard_writer(
    config: CheckpointWriterConfig,
    rank_info: RankInfo,
    barrier_class: "Callable[..., Barrier] | None" = None,
    barrier_args: dict[str, Any] | None = None,
    coordination: Coordination | None = None,
) -> CheckpointWriter:
    """The writer of a checkpoint process; its barrier is made there, as a connection cannot be passed on."""
    barrier = None if barrier_class is None else barrier_class(**(barrier_args or {}))
    return CheckpointWriter(config, rank_info, barrier, coordination=coordination)


def _check_coordination(coordination: Coordination, rank_info: RankInfo, barrier: "Barrier | None") -> None:
    if barrier is not None:
        raise ConfigError("ranks that vote need no barrier: pass a barrier or a coordination, not both")
    if rank_info != RankInfo(coordination.rank, coordination.world_size):
        raise ConfigError(f"the coordination is that of rank {coordination.rank}, not of {rank_info}")


def _directory(path: str) -> str:
    # Paths of pathlib are welcome too, though hooks get them as they are.
    if isinstance(path, (str, os.PathLike)):
        directory = os.fspath(path)
        if isinstance(directory, str) and directory:
            return directory
    raise ConfigError(f"{path!r} is no path to save a checkpoint at: pass the name of a directory, as a string")
