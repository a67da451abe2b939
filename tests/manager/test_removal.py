"""Hazards 7 and 8: nothing is removed before a newer one is durable, and nothing half removed counts."""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import assert_state, commit_together, contents, read, save
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import (
    ELEMENTS,
    assert_resumes,
    directories,
    file_of,
    lock_of,
    logged,
    make_run,
    manager_of,
    restore,
    tiny,
    wait_for,
    word_in_the_log,
)
from tests.storage.recording import Call, RecordingFileOps
from tests.survival.traces import ProcessEnd
from tests.survival.trainers import process_of

from lastgood import _events
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import StorageError
from lastgood.format.manifest import checkpoint_file
from lastgood.manager.catalog import Condition, read_catalog, read_entry
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.removal import prune, remove_checkpoint
from lastgood.manager.retention import KeepLast, KeepSteps, RetentionRule
from lastgood.manager.run_log import RemoveRecord, SaveRecord
from lastgood.storage.base import StorageLock
from lastgood.storage.local import LocalStorage


class EndingFileOps(RecordingFileOps):
    """The real operations up to the n-th: that one fails, and with ``for_ever``, so does every later one.

    Closing goes on working, as it does by itself when a process dies.
    """

    def __init__(self, place: int | None, *, for_ever: bool) -> None:
        super().__init__()
        self._place = place
        self._for_ever = for_ever

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = super().__getattr__(name)

        def counted(*arguments: Any, **options: Any) -> Any:
            place = len(self.calls)
            if name != "close" and self._refuses(place):
                self.calls.append(Call(name, "", ()))
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return operation(*arguments, **options)

        return counted

    def _refuses(self, place: int) -> bool:
        return self._place is not None and (place == self._place or (self._for_ever and place > self._place))


def _of_one_rank(root: Path, step: int) -> None:
    make_run(root, [step])


def _of_several_ranks(root: Path, step: int) -> None:
    assert commit_together(root / f"step-{step}", step) == [None, None]


def _of_independent_ranks(root: Path, step: int) -> None:
    for rank in range(2):
        save(root / f"step-{step}", step + rank, rank, 2)


KINDS = [_of_one_rank, _of_several_ranks, _of_independent_ranks]


def assert_counts_only_what_is_whole(root: Path, step: int, whole: dict[str, bytes]) -> bool:
    """Whether the catalog counts the step; if it does, all its files are as they were."""
    entry = read_entry(LocalStorage(), str(root), step)
    if entry.is_committed:
        found = contents(root / f"step-{step}")
        assert {name: found[name] for name in whole} == whole
        for rank in range(entry.world_size or 1):
            read(root / f"step-{step}", rank, entry.world_size or 1)
    else:
        assert entry.condition is Condition.UNFINISHED
    return entry.is_committed


@pytest.mark.parametrize("for_ever", [False, True], ids=["one operation fails", "it ends there"])
@pytest.mark.parametrize("make", KINDS)
def test_hazard_07_08_a_removal_that_ends_anywhere_leaves_the_whole_or_what_counts_for_nothing(
    tmp_path: Path, make: Callable[[Path, int], None], for_ever: bool
) -> None:
    template = tmp_path / "template"
    make(template, 10)
    make(template, 20)
    whole = contents(template / "step-10")
    newest = contents(template / "step-20")
    counted = EndingFileOps(None, for_ever=False)
    shutil.copytree(template, tmp_path / "complete")
    _remove(counted, tmp_path / "complete")
    assert directories(tmp_path / "complete") == ["step-20"]
    seen = []
    for place in range(len(counted.calls)):
        root = tmp_path / f"run-{place}"
        shutil.copytree(template, root)
        with suppress(StorageError):
            _remove(EndingFileOps(place, for_ever=for_ever), root)
        seen.append(assert_counts_only_what_is_whole(root, 10, whole))
        assert contents(root / "step-20") == newest
        assert read_entry(LocalStorage(), str(root), 20).is_committed
        # What was begun can be ended.
        storage = LocalStorage()
        report = prune(storage, str(root), [KeepLast(1)], protected={}, dry_run=False)
        assert report.skipped == ()
        assert directories(root) == ["step-20"], counted.calls[place].name
    assert True in seen
    assert False in seen
    assert seen == sorted(seen, reverse=True) or not for_ever  # once it counts for nothing, that is so for good


def _remove(operations: RecordingFileOps, root: Path) -> None:
    storage = LocalStorage(operations)
    remove_checkpoint(storage, read_entry(LocalStorage(), str(root), 10))


def test_the_commit_record_goes_first_and_durably(tmp_path: Path) -> None:
    _of_several_ranks(tmp_path, 10)
    operations = RecordingFileOps()
    _remove(operations, tmp_path)
    names = [
        (call.name, os.path.basename(call.path))
        for call in operations.calls
        if call.name in ("unlink", "fsync_directory", "remove_directory")
    ]
    assert names[:3] == [("unlink", "manifest.json"), ("fsync_directory", "step-10"), ("unlink", "checkpoint_0.pt")]


# When


def test_hazard_08_older_ones_stay_until_the_new_one_is_durable(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    before = contents(tmp_path / "step-10")
    with CheckpointManager(tmp_path, keep=KeepLast(1), preemption_signals=()) as manager:
        with lock_of(tmp_path, 30), events("staged") as staged:
            written = manager.save(30, tiny(30))
            wait_for(staged)
            assert manager._housekeeping.wait(PATIENCE_SECS)
            assert manager.steps() == [10, 20]
            assert contents(tmp_path / "step-10") == before
            assert not written.done()
        written.result(PATIENCE_SECS)
        manager.wait()
        assert directories(tmp_path) == ["step-30"]
    (removed,) = logged(tmp_path, RemoveRecord)
    assert [entry.step for entry in removed.removed] == [10, 20]
    assert all("step 30 is newer and committed" in " ".join(entry.reasons) for entry in removed.removed)
    assert [entry.step for entry in removed.kept] == [30]


@contextmanager
def events(phase: str) -> Any:
    """An event that is set once a phase of this name has ended."""
    ended = threading.Event()
    unsubscribe = _events.subscribe(lambda event: ended.set() if event.phase == phase else None)
    try:
        yield ended
    finally:
        unsubscribe()


FAILURES = {
    "a full disk": ("pwrite", errno.ENOSPC),
    "no room for it": ("reserve", errno.ENOSPC),
    "a dying disk": ("fsync", errno.EIO),
    "a root that is read only": ("open_exclusive", errno.EROFS),
    "no right to make directories": ("make_directory", errno.EACCES),
    "a name that cannot be given": ("replace", errno.EIO),
}


@pytest.mark.parametrize(("operation", "number"), FAILURES.values(), ids=FAILURES)
def test_hazard_08_a_save_that_fails_removes_nothing(tmp_path: Path, operation: str, number: int) -> None:
    make_run(tmp_path, [10, 20])
    before = {name: data for name, data in contents(tmp_path).items() if name != "lastgood.jsonl"}
    operations, records = RecordingFileOps(), list[SaveRecord]()
    with manager_of(tmp_path, ops=operations, keep=KeepLast(1), on_save=records.append) as manager:
        operations.fail(operation, number)
        failed = manager.save(30, tiny(30))
        assert isinstance(failed.exception(0), StorageError)
        manager.wait()
        assert manager.steps() == [10, 20]
        after = contents(tmp_path)
        after.pop("lastgood.jsonl")
        assert after == before
        operations.heal(operation)
        manager.save(40, tiny(40)).result(0)
        manager.wait()
        # What the failed save has left is gone too.
        assert directories(tmp_path) == ["step-40"]
    assert [(record.step, record.outcome) for record in records] == [(30, "failed"), (40, "durable")]


def test_hazard_08_a_checkpoint_process_that_is_killed_removes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    with CheckpointManager(tmp_path, keep=KeepLast(1), preemption_signals=()) as manager:
        assert isinstance(manager._checkpointer, AsyncCheckpointer)
        with lock_of(tmp_path, 30), events("staged") as staged:
            failed = manager.save(30, tiny(30))
            wait_for(staged)
            with ProcessEnd(process_of(manager._checkpointer)) as process:
                process.send_signal(signal.SIGKILL)
                assert process.wait()
            assert failed.exception(PATIENCE_SECS) is not None
            manager.wait()
            assert manager.steps() == [10, 20]
        manager.save(40, tiny(40)).result(PATIENCE_SECS)
        manager.wait()
        assert directories(tmp_path) == ["step-40"]
    assert_resumes(tmp_path, 40)


@pytest.mark.parametrize("keep", [KeepLast(1), KeepSteps((999,))])
def test_hazard_08_what_a_rewound_run_has_saved_stays_whatever_its_number(tmp_path: Path, keep: RetentionRule) -> None:
    """By its number it is the oldest of all, and no rule keeps it. Nor does one keep the newest, which stays too."""
    make_run(tmp_path, [10, 20, 30])
    with manager_of(tmp_path, keep=keep) as manager:
        restore(manager, 10)
        for step, left in ((5, [5, 30]), (7, [7, 30]), (40, [40])):
            manager.save(step, tiny(step)).result(0)
            manager.wait()
            assert manager.steps() == left


# Others who are there


def test_a_reader_that_has_it_open_reads_on_while_it_is_removed(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    storage = LocalStorage()
    file = storage.open(checkpoint_file(str(tmp_path / "step-10"), 0))
    expected = file_of(tmp_path, 10).read_bytes()
    first = bytearray(100)
    file.read_into(0, memoryview(first))
    assert prune(storage, str(tmp_path), [KeepLast(1)], protected={}, dry_run=False).removed
    assert directories(tmp_path) == ["step-20"]
    rest = bytearray(file.size - 100)
    file.read_into(100, memoryview(rest))
    file.close()
    assert bytes(first + rest) == expected


def test_a_mapped_checkpoint_outlives_its_removal(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    state = read(tmp_path / "step-10", mmap=True)
    prune(LocalStorage(), str(tmp_path), [KeepLast(1)], protected={}, dry_run=False)
    assert directories(tmp_path) == ["step-20"]
    assert_state(state, 10, ELEMENTS)


def test_what_somebody_is_writing_is_not_removed_before_he_has_ended(tmp_path: Path) -> None:
    """A former trainer's checkpoint process, saving an old step anew."""
    make_run(tmp_path, [10, 20])
    before = contents(tmp_path / "step-10")
    with manager_of(tmp_path, keep=KeepLast(1)) as manager:
        with lock_of(tmp_path, 10), word_in_the_log("could not be removed") as said:
            manager.save(30, tiny(30)).result(0)
            manager.wait()
            assert said.is_set()
            assert directories(tmp_path) == ["step-10", "step-30"]
            assert contents(tmp_path / "step-10").items() >= before.items()
        manager.save(40, tiny(40)).result(0)
        manager.wait()
        assert directories(tmp_path) == ["step-40"]


def test_what_was_saved_anew_since_it_was_judged_is_not_removed(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    judged = read_entry(LocalStorage(), str(tmp_path), 10)
    make_run(tmp_path, [10])
    assert remove_checkpoint(LocalStorage(), judged) is False
    assert [entry.step for entry in read_catalog(LocalStorage(), str(tmp_path)).committed] == [10, 20]


def test_what_others_have_put_beside_a_checkpoint_stays(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    (tmp_path / "step-10" / "notes.txt").write_text("the best one so far")
    (tmp_path / "step-10" / "checkpoint_0.pt.bak").write_bytes(b"a copy")
    with manager_of(tmp_path, keep=KeepLast(1)) as manager:
        for step in (30, 40):
            manager.save(step, tiny(step)).result(0)
        manager.wait()
        assert manager.steps() == [40]
    assert sorted(contents(tmp_path / "step-10")) == ["checkpoint_0.pt.bak", "notes.txt"]


def test_files_of_ranks_that_are_still_being_written_are_not_cleared_away(tmp_path: Path) -> None:
    make_run(tmp_path, [30])
    path = tmp_path / "step-20"
    storage = LocalStorage()
    write = storage.begin(str(path / "checkpoint_1.pt"), 3)  # As a rank does that holds no lock.
    try:
        assert storage.has_writers(str(path))
        with manager_of(tmp_path) as manager:
            for report in (manager.prune(dry_run=True), manager.prune()):
                assert [entry.step for entry, _ in report.skipped] == [20]
                assert report.leftovers == ()
        assert path.is_dir()
    finally:
        write.abort()
    with manager_of(tmp_path) as manager:
        assert [entry.step for entry in manager.prune().leftovers] == [20]
    assert not path.exists()


def test_nobody_can_begin_to_write_a_checkpoint_while_it_is_removed(tmp_path: Path) -> None:
    make_run(tmp_path, [10, 20])
    judged = read_entry(LocalStorage(), str(tmp_path), 10)
    operations, locks = RecordingFileOps(), list[StorageLock | None]()

    def unlink(real: Callable[[str], None], path: str) -> None:
        if path == str(file_of(tmp_path, 10)):
            locks.append(LocalStorage().try_lock(path))
        real(path)

    operations.replace_call("unlink", unlink)
    assert remove_checkpoint(LocalStorage(operations), judged)
    assert locks == [None]


def test_files_that_may_still_wait_for_their_manifest_are_not_cleared_away(tmp_path: Path) -> None:
    """Ranks that meet at a barrier hold no lock between the last of their files and the manifest."""
    now = time.time()
    for step, saved_at in ((5, now - 3601), (10, now)):
        path = tmp_path / f"step-{step}"
        assert commit_together(path, step, step=step, saved_at=saved_at) == [None, None]
        (path / "manifest.json").unlink()
    make_run(tmp_path, [20])
    for dry_run in (True, False):
        report = prune(LocalStorage(), str(tmp_path), [KeepLast(1)], protected={}, dry_run=dry_run)
        assert [entry.step for entry in report.leftovers] == [5]
        assert report.skipped == ()
    assert directories(tmp_path) == ["step-10", "step-20"]
    assert sorted(contents(tmp_path / "step-10")) == ["checkpoint_0.pt", "checkpoint_1.pt"]
