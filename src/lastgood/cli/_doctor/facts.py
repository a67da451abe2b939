"""All that ``doctor`` looks at, and nothing of what it makes of it. Nothing here changes anything."""

import os
import time

import msgspec

from lastgood.cli._disk import WriterTrace, disk_size, identity_of, writer_traces
from lastgood.errors import CorruptCheckpointError, StorageError
from lastgood.format.epoch import epoch_file, read_epoch
from lastgood.format.manifest import MANIFEST_NAME, checkpoint_file, rank_of
from lastgood.manager.catalog import Catalog, Condition, is_set_aside, read_catalog, step_of
from lastgood.manager.run_log import Record, read_run_log
from lastgood.storage._file_lock import lock_file
from lastgood.storage.base import StorageBackend
from lastgood.storage.file_ops import FileOps, OsFileOps


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found under a root at one moment.

    ``noted_steps``: for each step whose directory holds the checkpoint of another one, which one that is.
    ``traces``: what writers have, or have left, in the directory of each step, and with the key ``None`` in the root
    itself. ``strangers``: names in the directories of unfinished steps that are not lastgood's. ``set_aside``: sizes by
    name. ``plain_files``: files that have a step's name. ``log_problem``: why the run's log cannot be read.
    ``epoch_problem``: why nobody can tell which job of several ranks saves there. ``available``: the bytes that may
    still be written, if that is known.
    """

    root: str
    now: float
    catalog: Catalog
    noted_steps: dict[int, int] = {}
    traces: dict[int | None, tuple[WriterTrace, ...]] = {}
    strangers: dict[int, tuple[str, ...]] = {}
    set_aside: dict[str, int] = {}
    plain_files: tuple[str, ...] = ()
    log: tuple[Record, ...] = ()
    log_problem: str | None = None
    epoch_problem: str | None = None
    available: int | None = None


def look(storage: StorageBackend, root: str, ops: FileOps | None = None) -> Facts:
    """Gather the facts about the run that saves to ``root``."""
    ops = OsFileOps() if ops is None else ops
    catalog = read_catalog(storage, root)
    log, log_problem = _read_log(storage, root)
    try:
        available = ops.available_bytes(root)
    except OSError:
        available = None
    places = {entry.step: entry.path for entry in catalog.entries}
    misplaced = [entry for entry in catalog.entries if entry.condition is Condition.MISPLACED]
    identities = {entry.step: identity_of(storage, checkpoint_file(entry.path, 0)) for entry in misplaced}
    return Facts(
        root=root,
        now=time.time(),
        catalog=catalog,
        noted_steps={
            step: identity.step
            for step, identity in identities.items()
            if identity is not None and identity.step is not None
        },
        traces={None: tuple(trace for trace in writer_traces(root, ops) if not _is_of_epoch(trace))}
        | {step: tuple(writer_traces(path, ops)) for step, path in places.items()},
        strangers={
            entry.step: strangers
            for entry in catalog.entries
            if entry.condition is Condition.UNFINISHED and (strangers := _strangers(storage, entry.path))
        },
        set_aside={name: disk_size(os.path.join(root, name)) for name in catalog.others if is_set_aside(name)},
        plain_files=tuple(name for name in catalog.others if step_of(name) is not None),
        log=log,
        log_problem=log_problem,
        epoch_problem=_epoch_problem(storage, root),
        available=available,
    )


def _epoch_problem(storage: StorageBackend, root: str) -> str | None:
    try:
        read_epoch(storage, root)
    except (CorruptCheckpointError, StorageError) as error:
        return str(error)
    return None


def _is_of_epoch(trace: WriterTrace) -> bool:
    """Jobs of several ranks hold this lock whenever they publish; whoever takes it next clears it away."""
    return trace.path == lock_file(epoch_file(os.path.dirname(trace.path)))


def _strangers(storage: StorageBackend, path: str) -> tuple[str, ...]:
    try:
        return tuple(name for name in storage.list(path) if name != MANIFEST_NAME and rank_of(name) is None)
    except StorageError:
        return ()


def _read_log(storage: StorageBackend, root: str) -> tuple[tuple[Record, ...], str | None]:
    try:
        return tuple(read_run_log(storage, root)), None
    except StorageError as error:
        return (), str(error)
