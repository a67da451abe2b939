"""Waiting with a limit, and running tasks on threads."""

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest
from tests.helpers.interruptions import interrupt_starts
from tests.helpers.unmeasured import unmeasured_environment

from lastgood._image_writer import PieceWriters
from lastgood._threads import call_with_timeout, run_all


class TooLateError(Exception):
    pass


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """An event that happens only once the test is over, so that no thread is left waiting for it."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_returns_what_it_returns() -> None:
    assert call_with_timeout(lambda: (1, None), 60, TooLateError, name="test") == (1, None)
    assert call_with_timeout(lambda: None, 60, TooLateError, name="test") is None


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_a_call_raises_what_it_raises(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        call_with_timeout(fail, 60, TooLateError, name="test")
    assert caught.value is error
    # The place that failed is in the traceback.
    assert "fail" in [entry.name for entry in caught.traceback]


def test_a_call_that_takes_too_long_is_given_up(never: threading.Event) -> None:
    with pytest.raises(TooLateError) as caught:
        call_with_timeout(never.wait, 0.05, TooLateError, name="test")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_it_runs_in_a_named_daemon_thread() -> None:
    thread = call_with_timeout(threading.current_thread, 60, TooLateError, name="test")
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert thread.name == "lastgood-test-0"


def test_all_tasks_run_several_at_a_time() -> None:
    together = threading.Barrier(3)
    done: list[int] = []

    def run(task: int) -> None:
        together.wait(60)
        done.append(task)

    run_all(range(9), run, 3, 60, TooLateError, name="test")
    assert sorted(done) == list(range(9))


def test_nothing_to_do() -> None:
    run_all([], lambda task: None, 3, 60, TooLateError, name="test")


def test_after_a_failure_nothing_more_is_begun_and_the_first_one_counts() -> None:
    begun: list[int] = []
    second_failed = threading.Event()

    def run(task: int) -> None:
        begun.append(task)
        if task == 1:
            second_failed.set()
            raise ValueError("the second")
        if task == 0:
            second_failed.wait(60)
            raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        run_all(range(100), run, 2, 60, TooLateError, name="test")
    assert sorted(begun) == [0, 1]


def test_a_task_that_hangs_is_given_up_and_no_other_is_begun(never: threading.Event) -> None:
    begun: list[int] = []

    def run(task: int) -> None:
        begun.append(task)
        never.wait()

    with pytest.raises(TooLateError):
        run_all(range(10), run, 2, 0.05, TooLateError, name="test")
    never.set()
    for thread in threading.enumerate():
        if thread.name.startswith("lastgood-test"):
            thread.join(60)
    assert sorted(begun) == [0, 1]


def test_progress_counts_not_the_whole() -> None:
    """Each task takes less than the limit, all together more."""
    run_all(range(8), lambda task: threading.Event().wait(0.15), 1, 1, TooLateError, name="test")


def test_a_call_given_up_does_not_keep_the_interpreter_from_exiting() -> None:
    code = """
import threading
import weakref
from lastgood._threads import call_with_timeout
try:
    call_with_timeout(threading.Event().wait, 0.01, lambda: TimeoutError("late"), name="test")
except TimeoutError:
    print("given up")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "given up\n"
    assert run.stderr == ""


INTERRUPTED_AGAIN_AND_AGAIN = """
import random, signal, sys, time
from lastgood._threads import call_with_timeout

is_armed = False

def interrupt(number, frame):
    global is_armed
    if is_armed:
        is_armed = False
        raise KeyboardInterrupt

seed = random.randrange(2**32)
moments = random.Random(seed)
signal.signal(signal.SIGALRM, interrupt)
sys.unraisablehook = lambda *_: None  # Python drops what is raised in a weak reference's callback
interruptions = 0
end = time.monotonic() + 6
while time.monotonic() < end:
    try:
        is_armed = True
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 6e-4))
        while is_armed:
            call_with_timeout(lambda: None, 60, TimeoutError, name="test")
    except KeyboardInterrupt:
        interruptions += 1
    except BaseException as error:
        sys.exit(f"seed {seed}, after {interruptions} interruptions: {error!r}")
assert interruptions > 100, interruptions
"""


def test_an_interruption_is_raised_as_what_it_is_at_whatever_moment_it_comes() -> None:
    # Unmeasured: interrupted while it takes its lock, coverage never gives it up again.
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AGAIN_AND_AGAIN],
        env=unmeasured_environment(),
        timeout=100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_an_interrupted_start_keeps_its_cause_ends_the_tasks_and_keeps_nothing_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Snapshot:
        pass

    cause, causes = ValueError("why"), list[BaseException | None]()
    first_task_done, done = threading.Event(), list[int]()

    def run(task: int) -> None:
        first_task_done.wait(60)
        done.append(task)

    def caller() -> "weakref.ref[Snapshot]":
        snapshot = Snapshot()
        try:
            run_all(range(1000), run, 2, 60, TimeoutError, name="test")
        except KeyboardInterrupt as interruption:
            causes.append(interruption.__cause__)
        return weakref.ref(snapshot)

    started = interrupt_starts(monkeypatch, "lastgood-test-1", cause)
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
    assert causes == [cause]
    first_task_done.set()
    assert len(started) == 2
    for thread in started:
        thread.join(60)
    assert len(done) <= 2


def test_an_interrupted_start_of_the_threads_that_write_a_file_leaves_none_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = interrupt_starts(monkeypatch, "lastgood-write-1")
    with pytest.raises(KeyboardInterrupt):
        PieceWriters(MagicMock(), "a file", 1, 3, 60)
    assert len(started) == 2
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


def test_a_failure_keeps_nothing_in_memory_once_it_was_handled() -> None:
    """Its traceback leads to the frames that it passed through, and they to whatever the caller has at hand."""

    class Snapshot:
        pass

    def fail(task: int) -> None:
        raise ValueError(task)

    def caller() -> "weakref.ref[Snapshot]":
        snapshot = Snapshot()
        with contextlib.suppress(ValueError):
            run_all([1, 2, 3], fail, 2, 60, TimeoutError, name="test")
        return weakref.ref(snapshot)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()


def test_the_last_work_is_done_when_no_more_threads_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    run_all([1, 2, 3], done.append, 2, 60, TimeoutError, name="test")
    assert done == [1, 2, 3]


def test_too_many_threads_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_all([1], print, 1, 60, TimeoutError, name="test")
