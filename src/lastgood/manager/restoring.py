"""Restoring a training's state from the checkpoints of its run, and what that leaves on disk and in the log."""

import os
import time
from typing import Any

from lastgood import _events
from lastgood._coordination.calls import hold_epoch
from lastgood._events import logger
from lastgood._loading.per_rank import PerRankRules
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import LastgoodError, StorageError
from lastgood.manager.bookkeeping import Bookkeeping
from lastgood.manager.catalog import Entry, read_catalog, read_entry, step_name
from lastgood.manager.progress import shown_progress
from lastgood.manager.ranks import Ranks
from lastgood.manager.resume import (
    PassedOver,
    Resumed,
    find_candidates,
    load_exactly,
    on_all,
    once_written,
    resume,
    set_aside,
    set_damaged_aside,
)
from lastgood.manager.run_log import RestoreRecord, SetAsideRecord
from lastgood.manager.state_loader import StateLoader
from lastgood.storage.base import StorageBackend


class Restoring:
    """Does what :meth:`CheckpointManager.restore` and :meth:`CheckpointManager.set_aside` promise.

    All ranks call it together; rank 0 looks at the disk for all, and keeps the books.
    """

    def __init__(
        self,
        storage: StorageBackend,
        root: str,
        ranks: Ranks,
        reader: CheckpointReader,
        books: Bookkeeping,
        *,
        random_states: bool,
        writer_timeout_secs: float,
        job: str | None,
    ) -> None:
        self._storage = storage
        self._root = root
        self._ranks = ranks
        self._reader = reader
        self._books = books
        self._random_states = random_states
        self._writer_timeout_secs = writer_timeout_secs
        self._job = job

    def restore(
        self,
        state: dict[str, Any],
        step: int | None,
        *,
        strict: bool,
        map_location: Any,
        per_rank: PerRankRules | None,
    ) -> Resumed:
        """Load the newest good checkpoint, or exactly that of ``step``, into ``state``."""
        began = time.perf_counter()
        loader = StateLoader(
            self._reader,
            self._ranks.info.global_world_size,
            state,
            random_states=self._random_states,
            strict=strict,
            map_location=map_location,
            per_rank=per_rank,
        )
        with _events.phase("restore", self._root), shown_progress("loading"):
            entries = self._ranks.from_first(lambda: self._entries(step))
            if step is None:
                resumed = resume(entries, loader.read, self._ranks)
            else:
                resumed = load_exactly(entries[0], loader.read, self._ranks)
            on_all(loader.put, self._ranks, "put in place what was loaded", self._root)
        if self._ranks.info.global_rank == 0 and resumed.step is not None:
            self._settle(resumed.step)
        if self._ranks.info.global_rank == 0:
            self._note(resumed, time.perf_counter() - began)
        return resumed

    def _entries(self, step: int | None) -> list[Entry]:
        if step is None:
            candidates = find_candidates(self._storage, self._root, writer_timeout_secs=self._writer_timeout_secs)
            if not self._take_over():
                return candidates
            # What a former job has committed until then counts; from now on it commits nothing.
            return find_candidates(self._storage, self._root, writer_timeout_secs=0)
        later = [entry.step for entry in read_catalog(self._storage, self._root).committed if entry.step > step]
        if later:
            logger.warning(
                "restoring step %d, but there are checkpoints of later steps (%s): a restart without a step would "
                "resume from the newest of all. set_aside() takes one out of the way.",
                step,
                ", ".join(map(str, later)),
            )
        entry = read_entry(self._storage, self._root, step)
        entry = once_written(self._storage, self._root, entry, self._writer_timeout_secs)
        return [read_entry(self._storage, self._root, step) if self._take_over() else entry]

    def _take_over(self) -> bool:
        """Let a former job of several ranks, which nobody knows to be gone, publish nothing here any more."""
        if self._job is None:
            return False
        try:
            hold_epoch(self._storage, self._root, self._job, self._writer_timeout_secs, look=True)
        except StorageError as error:  # a disk that is read only, say; a save would have to take over all the same
            logger.warning("a former job is not shut out of %s: %s", self._root, error)
            return False
        return True

    def _settle(self, step: int) -> None:
        """Whoever published it may have been killed before its name was certain; from now on the run stands on it."""
        try:
            for directory in (os.path.join(self._root, step_name(step)), self._root):
                self._storage.settle(directory)
        except StorageError as error:  # a disk that is read only, say
            logger.warning("a power cut may still take back the checkpoint of step %d: %s", step, error)

    def _note(self, resumed: Resumed, seconds: float) -> None:
        for passed in resumed.passed_over:
            if passed.is_damaged:
                self._set_damaged_aside(passed)
        self._books.note(
            RestoreRecord(time=time.time(), step=resumed.step, seconds=seconds, passed_over=resumed.problems())
        )

    def _set_damaged_aside(self, passed: PassedOver) -> None:
        try:
            name = set_damaged_aside(self._storage, self._root, passed)
        except LastgoodError as error:  # the run has what it needs, and the next save may replace it
            logger.warning("the checkpoint of step %d could not be set aside: %s", passed.step, error)
            return
        if name is None:
            logger.warning("the checkpoint of step %d is not set aside: it is being saved anew", passed.step)
        else:
            self._tell(passed.step, name, passed.problem)

    def set_aside(self, step: int) -> None:
        """Give the checkpoint of ``step`` another name."""

        def act() -> None:
            self._tell(step, set_aside(self._storage, self._root, step), "it was asked for")

        self._ranks.from_first(act)

    def _tell(self, step: int, name: str, problem: str) -> None:
        logger.warning("the checkpoint of step %d is set aside as %s: %s", step, name, problem)
        self._books.note(SetAsideRecord(time=time.time(), step=step, name=name, problem=problem))
