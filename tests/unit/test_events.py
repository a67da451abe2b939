"""Phases: what is published, to whom, and that watching harms nobody."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.helpers.saves import NotingBarrier, NotingHook, commit_together, save, state_of, writer_of
from tests.storage.recording import RecordingFileOps

import lastgood
from lastgood import _events
from lastgood._events import Event
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.types import RankInfo


@pytest.fixture
def seen() -> Iterator[list[Event]]:
    events: list[Event] = []
    unsubscribe = _events.subscribe(events.append)
    yield events
    unsubscribe()


def names(events: list[Event]) -> list[str]:
    return [event.phase for event in events]


def test_a_phase_is_published_when_it_ends(seen: list[Event]) -> None:
    with _events.phase("write", "/run/step-7", rank=3, nbytes=12):
        assert seen == []
    [event] = seen
    assert (event.phase, event.path, event.rank, event.nbytes, event.error) == ("write", "/run/step-7", 3, 12, None)
    assert event.seconds >= 0


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_phase_that_fails_is_published_with_its_error_which_goes_on(seen: list[Event], error: BaseException) -> None:
    with pytest.raises(type(error)), _events.phase("write", "/run"):
        raise error
    assert seen[0].error is error


def test_an_outer_phase_lasts_as_long_as_those_inside(seen: list[Event]) -> None:
    with _events.phase("save", "/run"), _events.phase("write", "/run"):
        threading.Event().wait(0.01)
    inner, outer = seen
    assert (inner.phase, outer.phase) == ("write", "save")
    assert outer.seconds >= inner.seconds >= 0.01


def test_a_failing_subscriber_is_logged_and_harms_nobody(seen: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("no disk for the metrics")

    undo = [_events.subscribe(fail) for _ in range(2)]
    after: list[Event] = []
    undo.append(_events.subscribe(after.append))
    try:
        with _events.phase("write", "/run"):
            pass
    finally:
        for unsubscribe in undo:
            unsubscribe()
    assert len(seen) == len(after) == 1
    assert [record.name for record in caplog.records] == ["lastgood", "lastgood"]
    assert "the event was write of /run" in caplog.text
    assert "no disk for the metrics" in caplog.text


def test_unsubscribing_ends_it_and_may_be_repeated() -> None:
    events: list[Event] = []
    first, second = _events.subscribe(events.append), _events.subscribe(events.append)
    first()
    with _events.phase("write", "/run"):
        pass
    assert len(events) == 1
    first()
    second()
    second()
    with _events.phase("write", "/run"):
        pass
    assert len(events) == 1


def test_a_subscriber_may_unsubscribe_while_it_is_called(seen: list[Event]) -> None:
    once: list[Event] = []

    def take_one(event: Event) -> None:
        once.append(event)
        unsubscribe()

    unsubscribe = _events.subscribe(take_one)
    after: list[Event] = []
    unsubscribe_after = _events.subscribe(after.append)
    for _ in range(2):
        with _events.phase("write", "/run"):
            pass
    unsubscribe_after()
    assert (len(once), len(after), len(seen)) == (1, 2, 2)


def test_only_the_packages_own_logger_is_used(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    save(tmp_path, 1)
    assert caplog.records
    assert {record.name for record in caplog.records} == {"lastgood"}
    with pytest.raises(ValueError, match="broken"), _events.phase("write", "/run"):
        raise ValueError("broken")
    assert "write of /run failed after" in caplog.text
    # The application decides what is shown: nothing is installed, nothing is set.
    assert logging.getLogger("lastgood").handlers == []
    assert logging.getLogger("lastgood").level == logging.NOTSET


def test_the_phases_of_a_save_by_one_rank(tmp_path: Path, seen: list[Event]) -> None:
    ops = RecordingFileOps()
    writer_of(barrier=NotingBarrier(ops), hook=NotingHook(ops)).write(str(tmp_path), state_of(1))
    assert names(seen) == ["capture", "write", "fsync", "pre_commit", "barrier", "commit", "post_commit", "save"]
    assert {event.rank for event in seen} == {0}
    assert {event.path for event in seen if event.phase not in ("write", "fsync")} == {str(tmp_path)}
    file = tmp_path / "checkpoint_0.pt"
    [write] = [event for event in seen if event.phase == "write"]
    assert (write.path, write.nbytes) == (str(file), file.stat().st_size)


def test_the_phases_of_a_save_by_two_ranks(tmp_path: Path, seen: list[Event]) -> None:
    assert commit_together(tmp_path, 1) == [None, None]
    for rank in (0, 1):
        mine = names([event for event in seen if event.rank == rank])
        assert mine == ["capture", "write", "fsync", "publish", "barrier", "commit", "save"]


def test_the_phases_of_a_save_that_fails(tmp_path: Path, seen: list[Event]) -> None:
    ops = RecordingFileOps()
    ops.fail("fsync", 5)
    with pytest.raises(lastgood.StorageError) as caught:
        writer_of(ops=ops).write(str(tmp_path), state_of(1))
    assert names(seen) == ["capture", "write", "fsync", "save"]
    assert [event.error for event in seen] == [None, None, caught.value, caught.value]


def test_the_phases_of_a_load(tmp_path: Path, seen: list[Event]) -> None:
    save(tmp_path, 1)
    seen.clear()
    CheckpointReader(RankInfo(0, 1)).read(str(tmp_path))
    assert "read" in names(seen)
    [event] = [event for event in seen if event.phase == "read"]
    file = tmp_path / "checkpoint_0.pt"
    assert (event.path, event.nbytes) == (str(file), file.stat().st_size)


def test_the_phases_of_a_single_file(tmp_path: Path, seen: list[Event]) -> None:
    file = str(tmp_path / "file.pt")
    lastgood.save({"w": torch.ones(3)}, file)
    assert names(seen) == ["capture", "write", "fsync", "commit", "save"]
    assert {event.path for event in seen} == {file}
