"""A line of progress: there in a terminal when something takes long, and nowhere else."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.helpers.workers import PATIENCE_SECS

import lastgood
from lastgood import _events, make_async_checkpointer, make_sync_checkpointer
from lastgood.manager import progress
from lastgood.manager.progress import shown_progress

SIZE = 24 << 20


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """The standard error stream is a terminal for the block; what was written to it. (Not a fixture: pytest sets the
    stream anew before the test itself.)"""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with os.fdopen(theirs, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)

        def shown() -> str:
            stream.flush()
            try:
                return os.read(ours, 1 << 20).decode()
            except BlockingIOError:
                return ""

        yield shown
    os.close(ours)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lastgood.save({"weights": torch.zeros(SIZE, dtype=torch.uint8)}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def test_a_long_load_is_shown_in_a_terminal(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LONG_SECS", 0.0)
    with terminal() as shown:
        with shown_progress("loading"):
            lastgood.load(file)
        assert "loading" in shown()


def test_a_short_one_is_not(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LONG_SECS", 1e9)
    with terminal() as shown:
        with shown_progress("loading"):
            lastgood.load(file)
        assert shown() == ""


def test_without_a_terminal_nothing_is_shown(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LONG_SECS", 0.0)
    with shown_progress("loading"):
        lastgood.load(file)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_bytes_of_a_write_are_told_of(tmp_path: Path, asynchronous: bool) -> None:
    told: list[_events.Progress] = []
    unsubscribe = _events.subscribe_to_progress(told.append)
    try:
        state = {"weights": torch.zeros(SIZE, dtype=torch.uint8)}
        if asynchronous:
            checkpointer = make_async_checkpointer()
            checkpointer.save(str(tmp_path / "new"), state)[1].result(PATIENCE_SECS)
            checkpointer.close()
        else:
            make_sync_checkpointer().save(str(tmp_path / "new"), state)
    finally:
        unsubscribe()
    path = tmp_path / "new" / "checkpoint_0.pt"
    assert all((each.phase, each.path) == ("write", str(path)) for each in told)
    assert all(0 < each.done <= each.total == path.stat().st_size for each in told)
    if not asynchronous:  # The checkpoint process tells of it once a second at most.
        assert max(each.done for each in told) == path.stat().st_size


def test_all_bytes_of_a_load_are_told_of(file: Path) -> None:
    told: list[_events.Progress] = []
    unsubscribe = _events.subscribe_to_progress(told.append)
    try:
        lastgood.load(file)
    finally:
        unsubscribe()
    assert max(each.done for each in told if each.phase == "read") == file.stat().st_size
    unsubscribe()  # Twice is no error.
