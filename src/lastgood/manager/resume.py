"""Finding the checkpoint to go on from: the newest one that is committed and verifies, the same on all ranks."""

import itertools
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from lastgood._events import logger
from lastgood.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LastgoodError,
    MissingKeysError,
    StorageError,
    TargetMismatchError,
    UncommittedCheckpointError,
    UnsafeCheckpointError,
)
from lastgood.format.commit import lock_for_writing
from lastgood.format.manifest import checkpoint_file
from lastgood.manager.catalog import Condition, Entry, read_catalog, read_entry, step_name
from lastgood.manager.ranks import Ranks
from lastgood.manager.run_log import StepProblem
from lastgood.storage.base import StorageBackend

_RESUMABLE = (Condition.COMMITTED, Condition.FOREIGN)


class PassedOver(msgspec.Struct, frozen=True):
    """A checkpoint that could not be used. ``is_damaged``: its bytes are not what was written, now and for ever.

    ``save_id`` tells it from one that is saved later under the same name. ``is_unreadable``: storage did not give it,
    this time.
    """

    step: int
    problem: str
    is_damaged: bool
    save_id: str | None = None
    is_unreadable: bool = False


class Resumed(msgspec.Struct, frozen=True):
    """Where a run goes on; ``step`` is ``None`` where there was no checkpoint at all."""

    step: int | None
    passed_over: tuple[PassedOver, ...] = ()

    def problems(self) -> list[StepProblem]:
        """What was passed over, for the log."""
        return [StepProblem(passed.step, passed.problem) for passed in self.passed_over]


class _Vote(msgspec.Struct, frozen=True):
    """What became of a load on one rank: all is well, or the checkpoint cannot be used, or nothing can go on.

    At most one of the flags is set; none where the checkpoint is whole, and not one to resume from.
    """

    problem: str | None = None
    is_damaged: bool = False
    is_fatal: bool = False
    is_unreadable: bool = False


def find_candidates(storage: StorageBackend, root: str, *, writer_timeout_secs: float) -> list[Entry]:
    """All steps of which there is anything, the newest first, once nobody writes the newest ones any more.

    A former trainer's checkpoint process may still be finishing what was staged before that trainer died: it is waited
    for, at most ``writer_timeout_secs``.
    """
    deadline = time.monotonic() + writer_timeout_secs
    entries = sorted(read_catalog(storage, root).entries, key=lambda entry: entry.step, reverse=True)
    newer = list(itertools.takewhile(lambda entry: not entry.is_committed, entries))
    for number, entry in enumerate(newer):
        entries[number] = once_written(storage, root, entry, max(0.0, deadline - time.monotonic()))
    return entries


def once_written(storage: StorageBackend, root: str, entry: Entry, timeout_secs: float) -> Entry:
    """The entry as it is when nobody writes its file any more; waits at most ``timeout_secs``."""
    if entry.condition is not Condition.UNFINISHED or not storage.exists(entry.path):
        return entry
    lock = None
    try:
        # Where nothing can be locked, as on a disk that is read only, nobody is writing either.
        lock = storage.try_lock(checkpoint_file(entry.path, 0))
        if lock is None:
            logger.info("the save of step %d is still being written, by an earlier process: waiting for it", entry.step)
            lock = lock_for_writing(storage, entry.path, 0, timeout_secs)
        return read_entry(storage, root, entry.step)
    except StorageError as error:
        logger.warning("the save of step %d is left out: %s", entry.step, error)
        return entry
    finally:
        if lock is not None:
            lock.release()


def resume(entries: Sequence[Entry], load: Callable[[Entry], None], ranks: Ranks) -> Resumed:
    """Load the first of ``entries`` that every rank can load by ``load``; to be called by all ranks.

    Where a checkpoint is damaged, unfinished or cannot be read, on one rank or all, all go on with the next. Any other
    error of a load is raised, on all ranks. So is :class:`~lastgood.errors.CorruptCheckpointError` if there are
    checkpoints and none can be used, or :class:`~lastgood.errors.StorageError` if that is because they cannot be read,
    and none is damaged: a training must not begin anew without somebody's knowing.
    """
    passed_over: list[PassedOver] = []
    was_there = False
    unreadable: StorageError | None = None
    for entry in entries:
        if entry.condition is Condition.UNFINISHED:
            logger.info("step %d is passed over: %s", entry.step, entry.problem)
            passed_over.append(PassedOver(entry.step, str(entry.problem), is_damaged=False))
            continue
        was_there = True
        problem, error = _load_on_all(entry, load, ranks)
        if problem is None:
            return Resumed(entry.step, tuple(passed_over))
        if isinstance(error, StorageError):
            unreadable = error
        logger.warning("the checkpoint of step %d is passed over: %s", entry.step, problem.problem)
        passed_over.append(problem)
    if was_there:
        raise _none_is_good(entries, passed_over, unreadable) from unreadable
    return Resumed(None, tuple(passed_over))


def load_exactly(entry: Entry, load: Callable[[Entry], None], ranks: Ranks) -> Resumed:
    """Load this one; what goes wrong on one rank is raised on all."""
    on_all(lambda: load(entry), ranks, f"load step {entry.step}", entry.path)
    return Resumed(entry.step)


def on_all(act: Callable[[], None], ranks: Ranks, what: str, path: str) -> None:
    """Do it on all ranks; what goes wrong on one is raised on all, so that none goes on alone."""
    error: Exception | None = None
    try:
        act()
    except Exception as raised:
        error = raised
    problems = ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise LastgoodError(f"rank {rank} cannot {what}: {problem}", path=path, rank=rank)


def _load_on_all(
    entry: Entry, load: Callable[[Entry], None], ranks: Ranks
) -> tuple[PassedOver | None, Exception | None]:
    """Load it on all ranks; what was wrong with it, if anything, and what was raised on this rank."""
    vote, error = _try(entry, load)
    votes = ranks.gather(vote)
    for rank, other in enumerate(votes):
        if other.is_fatal:
            if error is not None and vote.is_fatal:
                raise error
            raise LastgoodError(
                f"rank {rank} cannot resume from step {entry.step}: {other.problem}", path=entry.path, rank=rank
            )
    problems = [(rank, other.problem) for rank, other in enumerate(votes) if other.problem is not None]
    if not problems:
        return None, None
    rank, problem = problems[0]
    told = problem if len(votes) == 1 else f"on {len(problems)} of {len(votes)} ranks, on rank {rank}: {problem}"
    is_damaged = any(other.is_damaged for other in votes)
    is_unreadable = any(other.is_unreadable for other in votes)
    return PassedOver(entry.step, str(told), is_damaged, entry.save_id, is_unreadable), error


def _try(entry: Entry, load: Callable[[Entry], None]) -> tuple[_Vote, Exception | None]:
    if entry.condition not in _RESUMABLE:
        return _Vote(
            entry.problem,
            is_damaged=entry.condition is Condition.DAMAGED,
            is_unreadable=entry.condition is Condition.UNREADABLE,
        ), None
    try:
        load(entry)
    except CorruptCheckpointError as error:
        # Which targets were half filled does not matter once the next checkpoint fills them.
        damage = error.__cause__ if isinstance(error.__cause__, CorruptCheckpointError) else error
        return _Vote(str(damage), is_damaged=True), error
    except (UnsafeCheckpointError, MissingKeysError, TargetMismatchError) as error:
        # A file of ours holds what the user has to allow, or another model; one of others may be anything.
        is_ours = entry.is_committed
        return _Vote(str(error), is_fatal=is_ours), error
    except (CheckpointNotFoundError, UncommittedCheckpointError, StorageError) as error:
        return _Vote(str(error), is_unreadable=isinstance(error, StorageError)), error
    except Exception as error:
        return _Vote(f"{type(error).__name__}: {error}", is_fatal=True), error
    return _Vote(), None


def _none_is_good(
    entries: Sequence[Entry], passed_over: Sequence[PassedOver], unreadable: StorageError | None
) -> LastgoodError:
    listed = "; ".join(f"step {passed.step}: {passed.problem.rstrip('.')}" for passed in passed_over)
    root = os.path.dirname(entries[0].path)
    if any(passed.is_unreadable for passed in passed_over) and not any(passed.is_damaged for passed in passed_over):
        return StorageError(
            f"none of the checkpoints under {root} can be read, and the training was not begun anew without being "
            f"asked: {listed}. None is known to be damaged, and nothing was changed there; what the state held may "
            "have been overwritten in part. Look at the device or the network behind this path, and start again.",
            errno=None if unreadable is None else unreadable.errno,
            path=root,
            phase="restore",
        )
    return CorruptCheckpointError(
        f"none of the checkpoints under {root} can be used, and the training was not begun anew without being asked: "
        f"{listed}. Everything is still there. What the state held may have been overwritten in part. `lastgood doctor "
        f"{root}` says more; to begin at step 0, use another root or move these away.",
        path=root,
        phase="restore",
    )


def set_damaged_aside(storage: StorageBackend, root: str, passed: PassedOver) -> str | None:
    """:func:`set_aside`, unless somebody is writing there, or has written another checkpoint there since: ``None``."""
    path = os.path.join(root, step_name(passed.step))
    lock = storage.try_lock(checkpoint_file(path, 0))
    if lock is None:
        return None
    try:
        is_the_same = read_entry(storage, root, passed.step).save_id == passed.save_id
    finally:
        lock.release()  # it lies in the directory that gets another name
    return set_aside(storage, root, passed.step) if is_the_same else None


def set_aside(storage: StorageBackend, root: str, step: int) -> str:
    """Give the directory of a step another name, which no run resumes from and nothing of lastgood removes.

    Returns that name, ``step-100.set-aside`` or the like.
    """
    base = f"{step_name(step)}.set-aside"
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}-{number}"
        if storage.exists(os.path.join(root, name)):
            continue
        try:
            storage.rename(os.path.join(root, step_name(step)), os.path.join(root, name))
        except CheckpointExistsError:
            continue
        return name
    raise AssertionError("unreachable: there are more numbers than directories")
