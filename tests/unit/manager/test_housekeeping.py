"""Work after a save: in order, on a thread that nobody has to wait for, and no failure ends it."""

import threading

import pytest
from tests.helpers.workers import PATIENCE_SECS

from lastgood.manager.housekeeping import Housekeeping


def test_jobs_are_done_in_order_in_another_thread() -> None:
    housekeeping = Housekeeping()
    done: list[tuple[int, int]] = []
    for number in range(20):
        housekeeping.do(lambda number=number: done.append((number, threading.get_ident())))  # type: ignore[misc]
    assert housekeeping.wait(PATIENCE_SECS)
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done} != {threading.get_ident()}
    assert len({thread for _, thread in done}) == 1
    housekeeping.close()


def test_a_job_that_fails_is_logged_and_the_next_is_done(caplog: pytest.LogCaptureFixture) -> None:
    housekeeping = Housekeeping()
    done = threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    housekeeping.do(fail)
    housekeeping.do(done.set)
    assert housekeeping.wait(PATIENCE_SECS)
    assert done.is_set()
    assert "ZeroDivisionError" in caplog.text
    housekeeping.close()


def test_a_wait_ends_when_its_time_is_over() -> None:
    housekeeping = Housekeeping()
    gate = threading.Event()
    housekeeping.do(lambda: gate.wait(PATIENCE_SECS) and None)
    assert not housekeeping.wait(0.01)
    gate.set()
    assert housekeeping.wait(PATIENCE_SECS)
    housekeeping.close()
    assert housekeeping.wait(0.0)


def test_where_no_thread_can_be_started_any_more_the_work_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    Housekeeping().do(lambda: done.append(1))
    assert done == [1]
