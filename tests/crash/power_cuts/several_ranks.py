"""Two ranks that save together, meeting at a barrier or voting, and what is made of it after the power was cut."""

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from tests.crash.power_cuts.cutting import Notes, Scenario
from tests.crash.power_cuts.promises import DURABLE, PRUNED, PRUNING, SAVING, Promises, promises_of
from tests.crash.power_cuts.runs_recovered import NEXT, ROOT, check_conditions, debris, read_at, without_threads
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.saves import NotingBarrier
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import tiny
from tests.unit.coordination.ranks_here import Hook, coordinations

from lastgood._contents import verify_checkpoint
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import CheckpointNotFoundError, SupersededError, UncommittedCheckpointError
from lastgood.format.epoch import EPOCH_NAME, Epoch, check_epoch, read_epoch, take_epoch
from lastgood.manager.catalog import read_catalog, step_name
from lastgood.manager.removal import prune
from lastgood.manager.retention import KeepLast
from lastgood.manager.verification import require_good
from lastgood.storage._file_lock import is_lock
from lastgood.storage.local import LocalStorage
from lastgood.testing import CrashFileOps
from lastgood.types import RankInfo

RANKS = (0, 1)
EPOCH = "epoch"
"""The note that a job has taken over: its number and its name."""

_VOTES = 8
"""Of so many recoveries, one lets the ranks vote; the others meet at a barrier, which costs less."""


def path_of(step: int) -> str:
    return os.path.join(ROOT, step_name(step))


# Ranks that meet at a barrier


def meet(ops: Any, path: str, number: int, first: int = 1) -> None:
    """Both ranks save; ``first`` is at the barrier before the other one begins."""
    arrived = threading.Event()

    class Arriving(NotingBarrier):
        def execute_barrier(self) -> None:
            arrived.set()
            super().execute_barrier()

    meeting = threading.Barrier(2)
    writers = [
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(rank, 2), barrier, storage=LocalStorage(ops))
        for rank, barrier in ((rank, Arriving(meeting=meeting)) for rank in RANKS)
    ]
    save = start(writers[first].write, path, tiny(number + first))
    wait_for(arrived, save)
    writers[1 - first].write(path, tiny(number + 1 - first))
    assert finished([save]) == [None]


def wait_for(event: threading.Event, save: "Future[Any]") -> None:
    """Until it is set, or the save that ought to set it has ended."""
    save.add_done_callback(lambda done: event.set())
    assert event.wait(PATIENCE_SECS), "what the test waits for does not happen"
    if save.done():
        save.result()


def saves_at_a_barrier(first: int) -> Callable[[CrashFileOps], None]:
    """Two steps, of which the first is pruned."""

    def record(ops: CrashFileOps) -> None:
        for step, number in ((1, 10), (2, 20)):
            note_and(ops, step, number, lambda path, number: meet(ops, path, number, first))
        ops.note(PRUNING, 1)
        pruned = prune(LocalStorage(ops), ROOT, [KeepLast(1)], protected={}, dry_run=False, check=require_good)
        assert len(pruned.removed) == 1
        ops.note(PRUNED)

    return record


def note_and(ops: CrashFileOps, step: int, number: int, save: Callable[[str, int], None]) -> None:
    ops.note(SAVING, step, number)
    save(path_of(step), number)
    ops.note(DURABLE, step, number)


# Ranks that vote


class _Turns:
    """Lets two ranks do their part one after the other, so that they change the disk in the same order every time.

    Rank 1 begins when rank 0's bytes are durable, and rank 0 goes on when rank 1's are. Rank 1 publishes its file when
    rank 0 has published its own and has let go of the lock of the epoch.
    """

    def __init__(self, ops: CrashFileOps) -> None:
        self._ops = ops
        self._is_published = False
        self.ready = [threading.Event(), threading.Event()]
        self.may_publish = threading.Event()

    def before_publication(self, rank: int) -> None:
        self.ready[rank].set()
        event = self.ready[1] if rank == 0 else self.may_publish
        assert event.wait(PATIENCE_SECS), f"rank {rank} waits for the other one"

    def __getattr__(self, name: str) -> Any:
        """The operations of both; those that matter are seen."""
        operation = getattr(self._ops, name)

        def seen(*arguments: Any) -> Any:
            result = operation(*arguments)
            if name == "replace" and arguments[1].endswith("checkpoint_0.pt"):
                self._is_published = True
            if name == "unlink" and arguments[0].endswith(f".{EPOCH_NAME}.lock") and self._is_published:
                self.may_publish.set()
            return result

        return seen


def vote(ops: CrashFileOps, path: str, number: int, job: str) -> None:
    """Both ranks save, as a job of this name."""
    turns = _Turns(ops)
    writers = [
        CheckpointWriter(
            CheckpointWriterConfig(),
            RankInfo(rank, 2),
            None,
            Hook(lambda path, rank=rank: turns.before_publication(rank)),  # type: ignore[misc]
            storage=LocalStorage(turns),  # type: ignore[arg-type]
            coordination=each,
        )
        for rank, each in enumerate(coordinations(2, job))
    ]
    saves = [start(writers[0].write, path, tiny(number))]
    wait_for(turns.ready[0], saves[0])
    saves.append(start(writers[1].write, path, tiny(number + 1)))
    try:
        assert finished(saves) == [None, None]
    finally:
        for writer in reversed(writers):
            writer.close()


def saves_by_vote(ops: CrashFileOps) -> None:
    job = secrets.token_hex(16)
    for step, number in ((1, 10), (2, 20)):
        note_and(ops, step, number, lambda path, number: vote(ops, path, number, job))
        ops.note(EPOCH, 1, job)


# After the power was cut


def recover_ranks(ops: CrashFileOps, notes: Notes) -> None:
    """A new job comes back: it takes over, finds what is there, saves and prunes."""
    epochs = [facts for kind, *facts in notes if kind == EPOCH]
    promises = Promises(note for note in notes if note[0] != EPOCH)
    voting = not int(ops.digest(), 16) % _VOTES
    job = secrets.token_hex(16)
    with without_threads():
        there = _check_catalog(ops, promises)
        _take_over(ops, epochs, job)
        newest = max(there, default=0)
        under_way = promises.under_way
        step = newest + 1 if under_way is None or under_way in there else under_way
        if not voting:
            meet(ops, path_of(step), NEXT)
    if voting:
        vote(ops, path_of(step), NEXT, job)
    with without_threads():
        _check_saved(ops, step, locks_are_cleared=voting)
        now = {**there, step: NEXT}
        kept = max(now)
        assert _check_catalog(ops, promises_of(now)) == now
        prune(LocalStorage(ops), ROOT, [KeepLast(1)], protected={}, dry_run=False, check=require_good)
        assert _check_catalog(ops, promises_of({kept: now[kept]})) == {kept: now[kept]}
        assert [entry.step for entry in read_catalog(LocalStorage(ops), ROOT).entries] == [kept]
        assert not debris(ops, ROOT)


def _check_catalog(ops: CrashFileOps, promises: Promises) -> dict[int, int]:
    """What is there by step, the same on both ranks; all the rest is no checkpoint, and nobody takes it for one."""
    storage = LocalStorage(ops)
    there, catalog = {}, read_catalog(storage, ROOT)
    check_conditions(catalog, promises)
    for entry in catalog.entries:
        if entry.is_committed:
            report = verify_checkpoint(entry.path, storage)
            assert not report.problems, report.problems
            [there[entry.step]] = {read_at(ops, entry.path, rank, 2) - rank for rank in RANKS}
            continue
        for rank in RANKS:
            with pytest.raises((UncommittedCheckpointError, CheckpointNotFoundError)):
                read_at(ops, entry.path, rank, 2)
    for step, number in there.items():
        assert number in promises.numbers.get(step, set()), f"step {step} is state {number}"
    required = promises.required(there)
    assert required <= set(there), f"the checkpoints of {required - set(there)} are gone"
    return there


def _check_saved(ops: CrashFileOps, step: int, *, locks_are_cleared: bool) -> None:
    """Ranks at a barrier lock nothing, and so do not see the file of a lock that somebody has left."""
    for rank in RANKS:
        assert read_at(ops, path_of(step), rank, 2) == NEXT + rank
    names = sorted(name for name in ops.list_directory(path_of(step)) if locks_are_cleared or not is_lock(name))
    assert names == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]


def _take_over(ops: CrashFileOps, former: list[list[Any]], job: str) -> None:
    """The record of jobs is whole, is not older than was promised, and shuts the former job out."""
    storage = LocalStorage(ops)
    before = read_epoch(storage, ROOT)
    for number, name in former:
        assert before == Epoch(number, name)
    taken = take_epoch(storage, ROOT, job, PATIENCE_SECS)
    assert taken == (1 if before is None else before.epoch + 1)
    assert read_epoch(storage, ROOT) == Epoch(taken, job)
    if before is not None:
        with pytest.raises(SupersededError):
            check_epoch(storage, ROOT, before)


MEETING = Scenario("two ranks meet, rank 1 first", saves_at_a_barrier(1), recover_ranks)
LARGER: list[Scenario] = [
    Scenario("two ranks meet, rank 0 first", saves_at_a_barrier(0), recover_ranks),
    Scenario("two ranks vote", saves_by_vote, recover_ranks),
]
SEVERAL = [MEETING, *LARGER]
