"""The log of a run: one JSON object a line in a file under its root, for people, scripts and ``lastgood report``.

The log decides nothing: what counts is what is on disk. A line is written when what it tells is over. After a crash
the last ones may be missing, and the very last may be cut short.
"""

import os
from collections.abc import Iterable
from contextlib import closing
from typing import Any, TypeAlias

import msgspec

from lastgood._events import logger
from lastgood.errors import CheckpointNotFoundError, StorageError
from lastgood.manager.catalog import RUN_LOG_NAME
from lastgood.storage.base import StorageBackend


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    time: float


class RunRecord(_Record, frozen=True, kw_only=True, tag="run"):
    """A manager was opened. ``rules`` are those of retention, as JSON; ``lastgood`` is the version."""

    pid: int
    host: str
    world_size: int
    rules: list[dict[str, Any]]
    lastgood: str


class SaveRecord(_Record, frozen=True, kw_only=True, tag="save"):
    """A save has ended, after all phases of it. Times in seconds, from the call of ``save`` on.

    ``outcome`` is ``durable`` or ``failed``. ``stall_secs``: until the call returned. ``staged_secs``: until training
    could change everything, and the snapshot survived the trainer (``None``: saved synchronously, or never staged).
    ``durable_secs``: until it survived a power cut. ``phases`` are the seconds of each phase of the writing. ``nbytes``
    is the size of this rank's file.
    """

    step: int
    outcome: str
    stall_secs: float
    staged_secs: float | None = None
    durable_secs: float | None = None
    nbytes: int | None = None
    phases: dict[str, float] = {}
    metrics: dict[str, float | None] | None = None
    error: str | None = None
    failures_in_a_row: int = 0

    def scalars(self) -> dict[str, float]:
        """Its numbers under names that a metrics system takes, such as ``checkpoint/stall_secs``."""
        numbers: dict[str, float | None] = {
            "stall_secs": self.stall_secs,
            "staged_secs": self.staged_secs,
            "durable_secs": self.durable_secs,
            "nbytes": self.nbytes,
            "failures_in_a_row": self.failures_in_a_row,
            **{f"phase_{name.replace(' ', '_')}_secs": seconds for name, seconds in self.phases.items()},
        }
        return {f"checkpoint/{name}": float(value) for name, value in numbers.items() if value is not None}


class StepProblem(msgspec.Struct, frozen=True):
    """A checkpoint that was passed over, and why."""

    step: int
    problem: str


class RestoreRecord(_Record, frozen=True, kw_only=True, tag="restore"):
    """A run looked for the checkpoint to go on from; ``step`` is ``None`` if there was none."""

    step: int | None
    seconds: float
    passed_over: list[StepProblem] = []


class StepReasons(msgspec.Struct, frozen=True):
    """A checkpoint that stayed or went, and why."""

    step: int
    reasons: list[str]


class RemoveRecord(_Record, frozen=True, kw_only=True, tag="remove"):
    """Retention has removed checkpoints."""

    removed: list[StepReasons]
    kept: list[StepReasons]


class SetAsideRecord(_Record, frozen=True, kw_only=True, tag="set aside"):
    """A checkpoint's directory has got the name ``name``, so that no run resumes from it."""

    step: int
    name: str
    problem: str


Record: TypeAlias = RunRecord | SaveRecord | RestoreRecord | RemoveRecord | SetAsideRecord

_decoder = msgspec.json.Decoder(Record)


def protected_by(records: Iterable[Record], *, saved: str = "the last that was saved") -> dict[int, str]:
    """The checkpoint that a run with this log stands on, and why: retention leaves it alone.

    After a return to an earlier step it is not that of the highest step. ``saved`` says why of one that was saved.
    """
    protected: dict[int, str] = {}
    for record in records:
        if isinstance(record, RestoreRecord) and record.step is not None:
            protected = {record.step: "the run resumed from it"}
        elif isinstance(record, SaveRecord) and record.outcome == "durable":
            protected = {record.step: saved}
    return protected


def append_record(storage: StorageBackend, root: str, record: Record) -> bool:
    """Add a line; returns whether it is there. A log that cannot be written is no reason to stop: it is said."""
    path = os.path.join(root, RUN_LOG_NAME)
    try:
        storage.append(path, msgspec.json.encode(record) + b"\n")
    except StorageError as error:
        logger.warning("the run's log lacks a line: %s", error)
        return False
    return True


def end_torn_line(storage: StorageBackend, root: str) -> None:
    """Make sure that the next record begins a line of its own, whatever a crash has left."""
    path = os.path.join(root, RUN_LOG_NAME)
    try:
        with closing(storage.open(path)) as file:
            last = bytearray(min(1, file.size))
            file.read_into(file.size - len(last), memoryview(last))
        if last and bytes(last) != b"\n":
            storage.append(path, b"\n")
    except CheckpointNotFoundError:
        pass
    except StorageError as error:
        logger.warning("the run's log may get a line that cannot be read: %s", error)


def read_run_log(storage: StorageBackend, root: str) -> list[Record]:
    """The records in the order in which they were written; lines that are cut short or unknown are left out."""
    try:
        with closing(storage.open(os.path.join(root, RUN_LOG_NAME))) as file:
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
    except CheckpointNotFoundError:
        return []
    records = []
    for line in bytes(data).splitlines():
        try:
            records.append(_decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return records
