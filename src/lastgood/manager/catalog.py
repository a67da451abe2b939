"""What stands under the root of a run: which steps have a checkpoint, and which of them count.

Everything is found from what is on disk at the time of asking. Nothing here changes anything.
"""

import enum
import os
import re
from contextlib import closing

import msgspec

from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from lastgood.format.commit import read_manifest
from lastgood.format.epoch import EPOCH_NAME
from lastgood.format.identity import FileIdentity, read_identity
from lastgood.format.manifest import MANIFEST_NAME, Manifest, absent_ranks, checkpoint_file, rank_of
from lastgood.storage.base import StorageBackend

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_SET_ASIDE = re.compile(r"step-(0|[1-9][0-9]{0,17})\.set-aside(-[1-9][0-9]*)?")

RUN_LOG_NAME = "lastgood.jsonl"
"""The file under the root that tells of the run's saves, one JSON object a line."""


def step_name(step: int) -> str:
    """The name of the directory of a step's checkpoint, under the root."""
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has exactly this name; ``None`` for ``step-100.backup``, ``step-007`` and the like."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_set_aside(name: str) -> bool:
    """Whether this is the name of a checkpoint that was found damaged and set aside."""
    return _SET_ASIDE.fullmatch(name) is not None


class Condition(enum.StrEnum):
    """How far the checkpoint of a step can be trusted, as far as its commit record and its files' endings tell."""

    COMMITTED = "committed"
    """Its commit record is there and whole. Whether every byte is, only reading it all shows."""

    FOREIGN = "foreign"
    """A file of this name is there that lastgood did not write, or that is damaged beyond recognition."""

    UNFINISHED = "unfinished"
    """Nothing, or only files of some ranks: a save that was killed, failed, or is still under way."""

    MISPLACED = "misplaced"
    """The checkpoint of another step: somebody copied or renamed it."""

    DAMAGED = "damaged"
    """Commit record or files are there, and cannot be what was written."""

    UNREADABLE = "unreadable"
    """The operating system does not give what is there."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint of one step. ``problem`` says in words what is wrong with one that is not committed.

    ``nbytes`` counts the files of all ranks, ``saved_at`` is in seconds since 1970 (``None`` if it was not noted),
    ``metrics`` are those given to the save; ``None`` stands for a number that was not finite.
    """

    step: int
    path: str
    condition: Condition
    problem: str | None = None
    world_size: int | None = None
    nbytes: int = 0
    saved_at: float | None = None
    metrics: dict[str, float | None] | None = None
    save_id: str | None = None

    @property
    def is_committed(self) -> bool:
        """Whether it counts as a checkpoint."""
        return self.condition is Condition.COMMITTED


class Catalog(msgspec.Struct, frozen=True):
    """What is under ``root``: the entries of steps in rising order, and the names that are not ours, sorted."""

    root: str
    entries: tuple[Entry, ...]
    others: tuple[str, ...]

    @property
    def committed(self) -> tuple[Entry, ...]:
        """The entries that count, in rising order of steps."""
        return tuple(entry for entry in self.entries if entry.is_committed)

    def entry(self, step: int) -> Entry | None:
        """That of a step."""
        return next((entry for entry in self.entries if entry.step == step), None)


def read_catalog(storage: StorageBackend, root: str) -> Catalog:
    """Look at everything directly under ``root``, which need not be there.

    Of each checkpoint it reads the commit record and what says whose file it is: not its data.
    """
    entries, others = [], []
    for name in storage.list(root):
        if name == EPOCH_NAME:  # the business of jobs of several ranks, not of whoever looks
            continue
        step = step_of(name)
        entry = None if step is None else read_entry(storage, root, step)
        if entry is None or (entry.condition is Condition.UNFINISHED and _is_file(storage, entry.path)):
            others.append(name)
        else:
            entries.append(entry)
    return Catalog(root, tuple(sorted(entries, key=lambda entry: entry.step)), tuple(others))


def _is_file(storage: StorageBackend, path: str) -> bool:
    """Whether a file has the name of a checkpoint's directory."""
    try:
        storage.open(path).close()
    except (CheckpointNotFoundError, StorageError):
        return False
    return True


def read_entry(storage: StorageBackend, root: str, step: int) -> Entry:
    """The entry of one step; ``UNFINISHED`` if there is nothing."""
    return read_entry_at(storage, os.path.join(root, step_name(step)), step)


def read_entry_at(storage: StorageBackend, path: str, step: int) -> Entry:
    """The entry of a checkpoint's directory of whatever name, such as that of one set aside."""
    try:
        names = storage.list(path)
        manifest = read_manifest(storage, path) if MANIFEST_NAME in names else None
        files = {rank for name in names if (rank := rank_of(name)) is not None}
        return _judge(storage, step, path, files, manifest)
    except CorruptCheckpointError as error:
        return Entry(step=step, path=path, condition=Condition.DAMAGED, problem=str(error))
    except CheckpointNotFoundError:  # removed at this moment
        return Entry(step=step, path=path, condition=Condition.UNFINISHED, problem="it is being removed")
    except StorageError as error:
        return Entry(step=step, path=path, condition=Condition.UNREADABLE, problem=str(error))


def _judge(storage: StorageBackend, step: int, path: str, files: set[int], manifest: Manifest | None) -> Entry:
    def entry(condition: Condition, problem: str | None = None, first: FileIdentity | None = None) -> Entry:
        if first is None:
            return Entry(step=step, path=path, condition=condition, problem=problem)
        return Entry(
            step=step,
            path=path,
            condition=condition,
            problem=problem,
            world_size=first.world_size,
            nbytes=sum(file.size for file in manifest.files) if manifest else _size(storage, path, first, files),
            saved_at=first.saved_at,
            metrics=first.metrics,
            save_id=first.save_id,
        )

    if 0 not in files:
        if manifest is not None:
            return entry(Condition.DAMAGED, "its manifest names a file of rank 0 that is not there")
        what = f"only {len(files)} of its files are there" if files else "no file of it is there"
        return entry(Condition.UNFINISHED, f"{what}: its save was killed or failed, or is still under way")
    first = _identity(storage, path, 0)
    if first is None:
        if manifest is not None:
            return entry(Condition.DAMAGED, "its manifest names a file of rank 0 that lastgood did not write")
        return entry(Condition.FOREIGN, "lastgood did not write it, or it is damaged beyond recognition")
    if manifest is not None:
        named = manifest.files[0]
        if (named.save_id, named.size, named.trailer_crc) != (first.save_id, first.size, first.trailer_crc):
            return entry(Condition.DAMAGED, "its file of rank 0 is not the one that its manifest names", first)
    elif first.world_size > 1 and not first.independent:
        return entry(
            Condition.UNFINISHED,
            f"{len(files)} of {first.world_size} files are there and no manifest: its save was killed or failed, or is "
            "still under way",
            first,
        )
    missing = absent_ranks(first.world_size, files, 11)
    if missing:
        listed = ", ".join(str(rank) for rank in missing[:10]) + (", ..." if len(missing) > 10 else "")
        if first.independent:
            return entry(Condition.UNFINISHED, f"the files of the ranks {listed} are not there", first)
        return entry(Condition.DAMAGED, f"the files of the ranks {listed}, which belong to it, are not there", first)
    if first.rank != 0:
        return entry(Condition.DAMAGED, f"its file of rank 0 was written by rank {first.rank}", first)
    if first.step not in (None, step):
        return entry(Condition.MISPLACED, f"it is the checkpoint of step {first.step}: a copy, or renamed", first)
    return entry(Condition.COMMITTED, first=first)


def _size(storage: StorageBackend, path: str, first: FileIdentity, files: set[int]) -> int:
    """The bytes of the files that are there and belong to a checkpoint without a manifest."""
    size = first.size
    for rank in sorted(rank for rank in files if 0 < rank < first.world_size):
        with closing(storage.open(checkpoint_file(path, rank))) as file:
            size += file.size
    return size


def _identity(storage: StorageBackend, path: str, rank: int) -> FileIdentity | None:
    with closing(storage.open(checkpoint_file(path, rank))) as file:
        return read_identity(file)
