"""Signals that come while lastgood waits."""

import threading

import pytest


def interrupt_starts(
    monkeypatch: pytest.MonkeyPatch, name: str, cause: Exception | None = None
) -> list[threading.Thread]:
    """Every start of a thread of this name is interrupted, as if by Ctrl-C, once the thread runs.

    What is raised then is what the standard library makes of it. Returns the threads that were started, of whatever
    name, to which later ones are added.
    """
    start, started = threading.Thread.start, list[threading.Thread]()

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if thread.name == name:
            try:
                raise KeyboardInterrupt from cause
            except KeyboardInterrupt:
                raise RuntimeError("release unlocked lock")  # noqa: B904

    monkeypatch.setattr(threading.Thread, "start", start_and_be_interrupted)
    return started
