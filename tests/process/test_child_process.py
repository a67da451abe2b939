"""The primitive that starts a child and knows whether it lives."""

import os
import signal
import sys
from pathlib import Path

import pytest
from tests.helpers.workers import PATIENCE_SECS

from lastgood._process import child_process
from lastgood._process.child_process import ChildOutput, ChildProcess


@pytest.fixture
def module(tmp_path: Path) -> dict[str, str]:
    """An environment in which there is a module "child"."""
    (tmp_path / "child.py").write_text(
        "import os, signal, sys\n"
        "descriptor = int(sys.argv[1])\n"
        "os.write(descriptor, b'%d %d' % (os.getppid(), os.getsid(0)))\n"
        "print('first'); print('second', file=sys.stderr); print('unfinished', end='')\n"
        "sys.exit(int(sys.stdin.read() == '') * 7) if sys.argv[2:] else signal.pause()\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.fixture(params=[True, False], ids=["pidfd", "no pidfd"])
def pidfds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(child_process, "open_pidfd", lambda pid: None)


@pytest.mark.usefixtures("pidfds")
def test_it_runs_in_a_session_of_its_own_and_ends_with_a_status(module: dict[str, str]) -> None:
    reader, writer = os.pipe()
    output = ChildOutput()
    arguments = [str(writer), "exit"]
    child = ChildProcess("child", arguments, pass_fds=[writer], environment=module, output=output.descriptor)
    os.close(writer)
    assert child.wait(PATIENCE_SECS)
    with open(reader) as said:
        assert said.read() == f"{os.getpid()} {child.pid}"
    assert not child.is_alive()
    assert child.how_it_ended() == "exited with status 7"
    assert output.read_lines() == "first\nsecond"
    assert output.read_lines(all_of_it=True) == "unfinished"
    assert output.last_lines(2) == "second\nunfinished"
    child.kill()
    assert child.end()
    child.close()
    output.close()
    assert output.read_lines() == ""


@pytest.mark.usefixtures("pidfds")
def test_it_can_be_killed_even_when_it_is_stopped(module: dict[str, str]) -> None:
    ours, theirs = os.pipe()
    child = ChildProcess("child", [str(theirs)], pass_fds=[theirs], environment=module)
    assert os.read(ours, 100)
    os.kill(child.pid, signal.SIGSTOP)
    assert not child.wait(0.05)
    assert child.is_alive()
    assert child.how_it_ended() == "is still running"
    assert child.end(PATIENCE_SECS)
    assert "signal 9, SIGKILL" in child.how_it_ended()
    child.close()
    os.close(ours)
    os.close(theirs)


def test_a_signal_that_is_held_back_does_not_end_a_child_that_is_only_starting(module: dict[str, str]) -> None:
    ours, theirs = os.pipe()
    held_back = [signal.SIGTERM]
    child = ChildProcess("child", [str(theirs)], pass_fds=[theirs], environment=module, held_back=held_back)
    os.kill(child.pid, signal.SIGTERM)
    assert os.read(ours, 100), "it lives on"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert child.end(PATIENCE_SECS)
    assert "signal 9, SIGKILL" in child.how_it_ended()
    child.close()
    os.close(ours)
    os.close(theirs)


def test_output_without_end_keeps_its_end_and_little_memory() -> None:
    output = ChildOutput()
    try:
        for number in range(40):
            os.write(output.descriptor, b"x" * 100_000 + b"\n%d\n" % number)
            assert output.read_lines().endswith(str(number))
        assert os.fstat(output.descriptor).st_size < 2 << 20
        assert output.last_lines(1) == "39"
    finally:
        output.close()


def test_a_python_that_is_not_there_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(FileNotFoundError):
        ChildProcess("child", [])
