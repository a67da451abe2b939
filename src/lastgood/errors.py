"""Everything lastgood raises, grouped by what a handler would do about it.

::

    LastgoodError
    |  fix the call or the configuration
    |-- ConfigError                  (ValueError)
    |-- UnsupportedStateError        (pickle.PicklingError, TypeError)
    |-- TargetMismatchError          (RuntimeError)
    |-- MissingKeysError             (RuntimeError)
    |-- RankMismatchError            (RuntimeError)
    |  choose another path, or another checkpoint
    |-- CheckpointNotFoundError      (FileNotFoundError)
    |-- CheckpointExistsError        (FileExistsError)
    |-- UncommittedCheckpointError   (RuntimeError)
    |  stop this job: another one has taken its place
    |-- SupersededError              (RuntimeError)
    |  do not trust this file: use an earlier checkpoint
    |-- CorruptCheckpointError       (RuntimeError)
    |-- UnsafeCheckpointError        (pickle.UnpicklingError)
    |  look at the machine, then save again
    |-- StorageError                 (OSError)
    |-- StagingError                 (RuntimeError)
    |   |-- TornSnapshotError        (StagingError)
    |   `-- ArenaMemoryError         (StagingError, MemoryError)
    |-- CheckpointProcessError       (RuntimeError)
    |-- SaveTimeoutError             (TimeoutError)
    `-- BarrierTimeoutError          (TimeoutError)

The built-in class in brackets is a base too, so code that catches what PyTorch raises goes on working.
A save that succeeds may still warn, by :class:`UnsafeValueWarning`.
"""

import pickle
from collections.abc import Sequence
from typing import Any, TypeVar


class LastgoodError(Exception):
    """The root of all errors raised on purpose.

    Whatever is known about the failure stands in attributes as well as in the message:
    ``path`` (file or directory), ``rank``, ``tensor`` (a dotted key path) and ``phase``
    (what was being done, such as ``"write"``). What is not known is ``None``.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        rank: int | None = None,
        tensor: str | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.rank = rank
        self.tensor = tensor
        self.phase = phase

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes: keep the attributes, and the errno that OSError hides in a slot.
        state = dict(self.__dict__)
        if isinstance(self, OSError):
            state["errno"] = self.errno
        return type(self), self.args, state


class ConfigError(LastgoodError, ValueError):
    """An argument or a configuration that cannot work, whatever is on disk."""


class UnsupportedStateError(LastgoodError, pickle.PicklingError, TypeError):
    """A value of the state dict cannot be saved; ``tensor`` holds its key path. Nothing was written."""


class TargetMismatchError(LastgoodError, RuntimeError):
    """What was saved does not fit the target: another shape or dtype, or another kind of value where tensors stand.

    No target has been changed.
    """


class MissingKeysError(LastgoodError, RuntimeError):
    """A strict load asked for keys that the checkpoint does not hold; ``missing_keys`` lists their paths."""

    def __init__(self, message: str, *, missing_keys: tuple[str, ...] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.missing_keys = missing_keys


class RankMismatchError(LastgoodError, RuntimeError):
    """What the ranks hold does not fit together; ``tensor`` names the first tensor concerned, ``rank`` a rank.

    A save: ranks of one mesh do not have the same tensors, or tensors that were declared to be the same on all ranks
    are not. Nothing is committed. A load: values that are not the same on all ranks are wanted by another number of
    ranks, and nobody has said which rank is to get which. Nothing has been changed.
    """


class CheckpointNotFoundError(LastgoodError, FileNotFoundError):
    """There is no checkpoint at this path."""


class CheckpointExistsError(LastgoodError, FileExistsError):
    """A committed checkpoint is there already, and this save may not replace it. It has not been touched."""


class UncommittedCheckpointError(LastgoodError, RuntimeError):
    """Files of a checkpoint are there, but the record that commits them is not: the save never finished."""


class SupersededError(LastgoodError, RuntimeError):
    """Another job has taken over the place where this one saves: this one can publish nothing there any more.

    What the other job saves is not touched. End this process; it was left over from before a restart.
    """


class CorruptCheckpointError(LastgoodError, RuntimeError):
    """The bytes on disk are not those that were written.

    ``tensor`` names the first damaged tensor where the damage lies in one. ``undefined_targets`` lists the key
    paths of in-place targets that may hold partly read data: load them again before use.
    """

    def __init__(self, message: str, *, undefined_targets: tuple[str, ...] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.undefined_targets = undefined_targets


class UnsafeCheckpointError(LastgoodError, pickle.UnpicklingError):
    """Loading the file would mean running code from it, or more memory than its size can justify.

    Nothing from the file was executed.
    """


class StorageError(LastgoodError, OSError):
    """The operating system refused or failed an operation on storage; ``errno`` says how, the cause is chained."""

    def __init__(self, message: str, *, errno: int | None = None, **known: Any) -> None:
        super().__init__(message, **known)
        self.errno = errno


class StagingError(LastgoodError, RuntimeError):
    """The state could not be copied to shared memory. That save was given up; nothing of it is published."""


class TornSnapshotError(StagingError):
    """A tensor changed between the call to ``save`` and the end of its copy; ``tensor`` names the first one found.

    Nothing of that snapshot is published, and earlier checkpoints are untouched.
    """


class ArenaMemoryError(StagingError, MemoryError):
    """There is not enough free memory for the snapshot. Nothing was copied."""


class CheckpointProcessError(LastgoodError, RuntimeError):
    """The checkpoint process could not be started, has died, or does not answer; ``pid`` is its number.

    The saves in flight have failed, the next one starts a new process, and earlier checkpoints are untouched.
    """

    def __init__(self, message: str, *, pid: int | None = None, **known: Any) -> None:
        super().__init__(message, **known)
        self.pid = pid


class SaveTimeoutError(LastgoodError, TimeoutError):
    """A wait of an asynchronous save took longer than its configuration allows."""


class BarrierTimeoutError(LastgoodError, TimeoutError):
    """Not all ranks arrived in time; ``missing_ranks`` names those that did not, where that can be known."""

    def __init__(self, message: str, *, missing_ranks: tuple[int, ...] = (), **known: Any) -> None:
        super().__init__(message, **known)
        self.missing_ranks = missing_ranks


class UnsafeValueWarning(UserWarning):
    """A value is being saved that a safe load will refuse; the message names its key path and what would help."""


Loaded = TypeVar("Loaded")


def require_all(loaded: Loaded, missing_keys: list[str], path: str, *, strict: bool) -> Loaded:
    """``loaded``, unless keys are missing from a strict load: then :class:`MissingKeysError`."""
    if strict and missing_keys:
        raise MissingKeysError(
            f"{path} has missing keys: {missing_keys}. The keys that it does hold have been loaded.",
            missing_keys=tuple(missing_keys),
            path=path,
        )
    return loaded


_LISTED = 5


def listed(names: Sequence[str]) -> str:
    """The first few names for an error message, and how many more there are."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def corrupt(path: str, what: str, *, tensor: str | None = None) -> CorruptCheckpointError:
    """The error for a damaged file, in the words that all of them share."""
    return CorruptCheckpointError(
        f"{path} is damaged: {what}. Nothing from it should be used; load an earlier checkpoint or another copy.",
        path=path,
        tensor=tensor,
    )
