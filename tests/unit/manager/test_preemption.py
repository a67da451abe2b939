"""Signals that announce the end: noticed once, passed on, and never a reason why a process cannot be ended."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.helpers.workers import PATIENCE_SECS

from lastgood.manager.preemption import PreemptionNotice

ROOT = Path(__file__).parents[3]


@contextmanager
def scenario(name: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.manager.signals", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def noticed(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return line(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_a_notice_and_the_second_ends_the_process(number: signal.Signals) -> None:
    with scenario("plain") as process:
        assert line(process).startswith("ready")
        assert noticed(process) == "noticed None"
        process.send_signal(number)
        assert noticed(process) == f"noticed {number.name}"
        process.send_signal(number)
        assert process.wait(PATIENCE_SECS) == -number


def test_the_handler_before_is_called_each_time() -> None:
    with scenario("former handler") as process:
        assert line(process).startswith("ready")
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            assert line(process) == "former handler SIGTERM"
            assert noticed(process) == "noticed SIGTERM"


def test_a_signal_that_was_ignored_ends_nothing() -> None:
    with scenario("ignored before") as process:
        assert line(process).startswith("ready")
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            assert noticed(process) == "noticed SIGUSR1"


def test_a_notice_that_was_removed_leaves_things_as_they_were() -> None:
    with scenario("removed") as process:
        assert line(process) == "True"
        assert line(process).startswith("ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECS) == -signal.SIGTERM


def test_a_forked_process_ends_as_it_would_have_without() -> None:
    # Data loaders end their workers by SIGTERM, and wait for them.
    with scenario("forked") as process:
        child = int(line(process).split()[1])
        os.kill(child, signal.SIGTERM)
        assert line(process) == f"child ended by {signal.SIGTERM.value} True"


def test_made_in_another_thread_it_says_that_it_notices_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    notices: list[PreemptionNotice] = []
    thread = threading.Thread(target=lambda: notices.append(PreemptionNotice([signal.SIGUSR1])))
    thread.start()
    thread.join(PATIENCE_SECS)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "main thread" in caplog.text
    notices[0].remove()


def test_a_handler_that_was_set_later_stays_and_two_notices_both_notice() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        first = PreemptionNotice([signal.SIGUSR1])
        second = PreemptionNotice([signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert first.came_at is not None
        assert second.came_at is not None
        assert calls == [signal.SIGUSR1]
        first.remove()  # In the middle of the chain: it only passes on from now.
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 2
        second.remove()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1] * 3
    finally:
        signal.signal(signal.SIGUSR1, before)
