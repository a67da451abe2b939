"""Removing checkpoints that no rule keeps, so that whatever dies in the middle, nothing half removed counts as one."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from lastgood._events import logger
from lastgood.errors import StorageError
from lastgood.format.manifest import MANIFEST_NAME, checkpoint_file, rank_of
from lastgood.manager.catalog import Catalog, Condition, Entry, read_catalog, read_entry
from lastgood.manager.retention import Decision, RetentionRule, Verdict, decide
from lastgood.storage.base import StorageBackend

_LONGEST_COMMIT_SECS = 3600.0


class PruneReport(msgspec.Struct, frozen=True):
    """What :func:`prune` did, or would do.

    ``leftovers`` are unfinished saves that were cleared away. ``skipped`` could not be removed this time, each with
    the reason. ``nbytes_freed`` counts the checkpoints in ``removed``.
    """

    decision: Decision
    removed: tuple[Verdict, ...]
    leftovers: tuple[Entry, ...]
    skipped: tuple[tuple[Entry, str], ...]
    nbytes_freed: int


def prune(
    storage: StorageBackend,
    root: str,
    rules: Sequence[RetentionRule],
    *,
    protected: Mapping[int, str],
    dry_run: bool,
    clear_files: bool = True,
    check: Callable[[StorageBackend, Entry], None] | None = None,
) -> PruneReport:
    """Remove what no rule keeps, and what unfinished saves have left; with ``dry_run``, only say what that would be.

    Each is removed by :func:`remove_checkpoint`; one that cannot be is skipped, and the others are removed all the
    same. With ``clear_files=False``, an unfinished save is only cleared away if it has left no rank's file.

    Commit records say which checkpoints count, not the data. ``check`` is called with the newest of those that stay,
    before anything is removed, and raises if it is damaged.
    """
    catalog = read_catalog(storage, root)
    decision = decide(catalog.entries, rules, protected=protected)
    abandoned = leftovers(storage, catalog, with_files=clear_files)
    skipped: list[tuple[Entry, str]] = []
    if check is not None and decision.remove and not dry_run:
        check(storage, decision.keep[-1].entry)
    if decision.remove and not dry_run:
        # Whoever published one that stays may have been killed before its name was certain.
        for directory in (*(verdict.entry.path for verdict in decision.keep), root):
            storage.settle(directory)

    def is_gone(entry: Entry) -> bool:
        try:
            gone = not storage.has_writers(entry.path) if dry_run else remove_checkpoint(storage, entry)
        except StorageError as error:
            skipped.append((entry, str(error)))
            return False
        if not gone:
            skipped.append((entry, "somebody is writing it, or has written it anew"))
        return gone

    removed = tuple(verdict for verdict in decision.remove if is_gone(verdict.entry))
    cleared = tuple(entry for entry in abandoned if is_gone(entry))
    return PruneReport(decision, removed, cleared, tuple(skipped), sum(verdict.entry.nbytes for verdict in removed))


def leftovers(storage: StorageBackend, catalog: Catalog, *, with_files: bool) -> tuple[Entry, ...]:
    """Unfinished saves of steps before the newest checkpoint: what is still under way is a later step's.

    With ``with_files=False``, only those in whose directory nothing is left that anybody could ask for.
    """
    if not catalog.committed:
        return ()
    newest = catalog.committed[-1].step
    found = []
    for entry in catalog.entries:
        if entry.condition is Condition.UNFINISHED and entry.step < newest and _is_over(entry):
            names = storage.list(entry.path)
            if all(_is_ours(name) for name in names) if with_files else not names:
                found.append(entry)
    return tuple(found)


def _is_over(entry: Entry) -> bool:
    """Between the last of its files and its manifest, nothing on disk tells a save of several ranks from a dead one."""
    return entry.saved_at is None or time.time() - entry.saved_at > _LONGEST_COMMIT_SECS


def _is_ours(name: str) -> bool:
    return name == MANIFEST_NAME or rank_of(name) is not None


def remove_checkpoint(storage: StorageBackend, entry: Entry) -> bool:
    """Remove the files of a checkpoint, the commit record before all others, and then its directory.

    Returns False, and leaves everything as it is, if somebody is writing there or the checkpoint is no longer the one
    that ``entry`` describes. Names that are not ours stay, and the directory with them.
    """
    names = storage.list(entry.path)
    ranks = sorted(rank for name in names if (rank := rank_of(name)) is not None)
    if storage.has_writers(entry.path):  # asked before our own locks are among those that are held
        return False
    with ExitStack() as held:
        if MANIFEST_NAME not in names:
            # A checkpoint process may still be writing there, of a trainer that is long dead.
            for rank in ranks or [0]:
                lock = storage.try_lock(checkpoint_file(entry.path, rank))
                if lock is None:
                    return False
                held.callback(lock.release)
        if not _is_the_same(storage, entry):
            return False
        # Without its commit record (for one rank, its file) it is no checkpoint any more, whatever comes next.
        if MANIFEST_NAME in names:
            storage.delete(os.path.join(entry.path, MANIFEST_NAME))
        for rank in ranks:
            storage.delete(checkpoint_file(entry.path, rank))
    if not storage.delete_directory(entry.path):
        logger.info("%s stays: there is something in it that is not lastgood's, or that is being written", entry.path)
    return True


def _is_the_same(storage: StorageBackend, entry: Entry) -> bool:
    found = read_entry(storage, os.path.dirname(entry.path), entry.step)
    return (found.condition, found.save_id) == (entry.condition, entry.save_id)
