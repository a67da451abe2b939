"""Which job may publish under a root: a small record there that each job of several ranks puts its name into.

A job that has been replaced (its machine was cut off, it was stopped and went on) must not publish over its successor.
Whoever publishes holds the record's lock, shared, and looks whether the record still names its job; whoever takes over
holds the lock alone. So nothing of a former job appears once its successor has taken over.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Annotated

import msgspec

from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, SupersededError
from lastgood.format.spec import crc32
from lastgood.storage.base import StorageBackend, StorageLock

EPOCH_NAME = "lastgood-epoch.json"
_LARGEST_RECORD = 4096
_LONGEST_PAUSE_SECS = 0.25


class Epoch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``epoch``-th job that has saved under a root, by its id."""

    epoch: Annotated[int, msgspec.Meta(ge=1)]
    job: str


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    crc32: Annotated[int, msgspec.Meta(ge=0)]
    epoch: msgspec.Raw


def epoch_file(root: str) -> str:
    """The name of the record of a root."""
    return os.path.join(root, EPOCH_NAME)


def read_epoch(storage: StorageBackend, root: str) -> Epoch | None:
    """The record, or ``None`` if no job of several ranks has saved under this root.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for one that is damaged.
    """
    name = epoch_file(root)
    try:
        with closing(storage.open(name)) as file:
            data = bytearray(min(file.size, _LARGEST_RECORD))
            file.read_into(0, memoryview(data))
    except CheckpointNotFoundError:
        return None
    try:
        sealed = msgspec.json.decode(bytes(data), type=_Sealed)
        if crc32(bytes(sealed.epoch)) != sealed.crc32:
            raise ValueError("its checksum does not match")
        return msgspec.json.decode(sealed.epoch, type=Epoch)
    except ValueError as error:  # what msgspec raises, too
        raise CorruptCheckpointError(
            f"{name}, which says which job saves there, is damaged: {error}. The checkpoints beside it are untouched. "
            "Make sure that no other job saves there, and delete it.",
            path=name,
            phase="epoch",
        ) from error


def take_epoch(storage: StorageBackend, root: str, job: str, timeout_secs: float) -> int:
    """Make ``job`` the one that may publish under ``root``, durably, and return its epoch.

    Call it once: what came before, which it shuts out, includes a job that had shut out this one. Waits at most
    ``timeout_secs`` for those who are publishing at this moment.
    """
    lock = _wait_for_lock(storage, root, timeout_secs, shared=False)
    try:
        before = read_epoch(storage, root)
        if before is not None and before.job == job:
            return before.epoch
        epoch = 1 if before is None else before.epoch + 1
        body = msgspec.json.encode(Epoch(epoch, job))
        data = msgspec.json.encode(_Sealed(crc32(body), msgspec.Raw(body))) + b"\n"
        publish(storage, epoch_file(root), data, nullcontext(), replace=True)
        return epoch
    finally:
        lock.release()


def publish(
    storage: StorageBackend, path: str, data: bytes, permission: AbstractContextManager[None], *, replace: bool
) -> None:
    """Write a small file whole; only its name comes while ``permission`` is held.

    Not in one ``put``: one that is given up for being slow goes on, and would bring back the record of a former job
    when its lock is free again. Here what may take long comes before that.
    """
    write = storage.begin(path, len(data))
    try:
        write.write_at(0, memoryview(data))
        write.make_durable()
        with permission:
            write.commit(replace=replace)
    except BaseException:
        write.abort()
        raise


def check_epoch(storage: StorageBackend, root: str, mine: Epoch) -> None:
    """Raise :class:`~lastgood.errors.SupersededError` if another job has taken over.

    A record that somebody has deleted names nobody else.
    """
    found = read_epoch(storage, root)
    if found is not None and found.job != mine.job:
        raise SupersededError(
            f"another job has taken over {root} (its number there is {found.epoch}, this one's is {mine.epoch}): this "
            "job can save nothing there any more, and what the other one saves is untouched. Stop this job: it was "
            "left over from before a restart, or two jobs were given the same place.",
            path=root,
            phase="epoch",
        )


@contextmanager
def publishing(storage: StorageBackend, root: str, mine: Epoch, timeout_secs: float) -> Iterator[None]:
    """While the block runs, no other job takes over; raises as :func:`check_epoch` if one has."""
    lock = _wait_for_lock(storage, root, timeout_secs, shared=True)
    try:
        check_epoch(storage, root, mine)
        yield
    finally:
        lock.release()


def _wait_for_lock(storage: StorageBackend, root: str, timeout_secs: float, *, shared: bool) -> StorageLock:
    name = epoch_file(root)

    def timed_out() -> StorageError:
        doing = "taking over or publishing" if shared else "publishing"
        return StorageError(
            f"another process has been {doing} under {root} for {timeout_secs:g} s (it holds the lock of {name}) and "
            "goes on; nothing was published by this one. Is a job from before a restart stopped there? End it.",
            path=root,
            phase="epoch",
        )

    return wait_for_lock(storage, name, timeout_secs, timed_out, shared=shared)


def wait_for_lock(
    storage: StorageBackend, path: str, timeout_secs: float, timed_out: Callable[[], Exception], *, shared: bool = False
) -> StorageLock:
    """The lock of a file once it is free; raises what ``timed_out`` makes after ``timeout_secs``."""
    deadline = time.monotonic() + timeout_secs
    pause = 0.001
    while (lock := storage.try_lock(path, shared=shared)) is None:
        if time.monotonic() > deadline:
            raise timed_out()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECS)
    return lock
