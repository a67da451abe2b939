"""What follows each save, on rank 0: a line in the log, and the end of checkpoints that no rule keeps any more."""

import threading
import time
from collections.abc import Callable, Sequence

from lastgood import _events
from lastgood.manager.catalog import Entry
from lastgood.manager.housekeeping import Housekeeping
from lastgood.manager.removal import PruneReport, prune
from lastgood.manager.retention import RetentionRule
from lastgood.manager.run_log import (
    Record,
    RemoveRecord,
    SaveRecord,
    StepReasons,
    append_record,
    end_torn_line,
    protected_by,
)
from lastgood.storage.base import StorageBackend


class Bookkeeping:
    """Keeps the log of a run and carries out its retention, in the background.

    A checkpoint is removed only after a newer one has become durable, and neither the one that was saved last nor the
    one that the run resumed from (until a later one is durable) ever is.
    """

    def __init__(
        self, storage: StorageBackend, root: str, rules: Sequence[RetentionRule], housekeeping: Housekeeping
    ) -> None:
        self._storage = storage
        self._root = root
        self._rules = tuple(rules)
        self._housekeeping = housekeeping
        self._protected: dict[int, str] = {}
        self._pruning = threading.Lock()
        self._opening: Record | None = None
        self._line_may_be_torn = True  # whatever the process before left
        self._prune_is_waiting = False

    def open(self, record: Record) -> None:
        """What the first line of this process will be. A run of which there is nothing to tell leaves no log."""
        self._opening = record

    def note(self, record: Record) -> None:
        """One more line; what it tells decides which checkpoint the run stands on from now."""
        self._protected = protected_by([record]) or self._protected
        opening, self._opening = self._opening, None
        if opening is not None:
            self._housekeeping.do(lambda: self._append(opening))
        self._housekeeping.do(lambda: self._append(record))

    def _append(self, record: Record) -> None:
        if self._line_may_be_torn:
            end_torn_line(self._storage, self._root)
        self._line_may_be_torn = not append_record(self._storage, self._root, record)

    def ended(self, record: SaveRecord) -> None:
        """A save is over."""
        self.note(record)
        if record.outcome == "durable" and self._rules and not self._prune_is_waiting:
            self._prune_is_waiting = True
            self._housekeeping.do(self._prune_after_save)

    def _prune_after_save(self) -> None:
        self._prune_is_waiting = False
        # Without looking at the newest one's data: this process has just written it.
        self.prune(dry_run=False, clear_files=False, check=None)

    def prune(
        self, *, dry_run: bool, clear_files: bool, check: Callable[[StorageBackend, Entry], None] | None
    ) -> PruneReport:
        """Carry out the run's retention, or say what that would be; ``check`` as for :func:`prune`."""
        with self._pruning, _events.phase("retention", self._root):
            report = prune(
                self._storage,
                self._root,
                self._rules,
                protected=self._protected,
                dry_run=dry_run,
                clear_files=clear_files,
                check=check,
            )
        if not dry_run:
            self._tell(report)
        return report

    def _tell(self, report: PruneReport) -> None:
        for entry, reason in report.skipped:
            _events.logger.warning("the checkpoint of step %d could not be removed: %s", entry.step, reason)
        if report.removed:
            self.note(removal_record(report))


def removal_record(report: PruneReport) -> RemoveRecord:
    """What a log tells of a removal."""
    removed, kept = (
        [StepReasons(verdict.entry.step, list(verdict.reasons)) for verdict in verdicts]
        for verdicts in (report.removed, report.decision.keep)
    )
    return RemoveRecord(time=time.time(), removed=removed, kept=kept)
