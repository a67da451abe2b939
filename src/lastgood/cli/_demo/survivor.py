"""A checkpoint process outlives its trainer: what it finishes after the kill, and that it is gone in the end."""

import contextlib
import os
import select
from pathlib import Path
from typing import TypeAlias

from lastgood._process.child_process import open_pidfd
from lastgood.manager.catalog import step_of

_File: TypeAlias = tuple[int, int]
"""Tells a file from the one that replaces it: its number and its time."""


class Survivor:
    """The checkpoint process ``pid`` of a training that saves in ``checkpoints``; made while that training lives."""

    def __init__(self, pid: int, checkpoints: Path) -> None:
        self.pid = pid
        self._checkpoints = checkpoints
        self._pidfd = open_pidfd(pid)
        self._files_at_the_kill: dict[int, _File] = {}

    def trainer_was_killed(self) -> None:
        """From now on, a checkpoint that appears is this process's work."""
        self._files_at_the_kill = self._files()

    def has_ended(self, timeout_secs: float = 0.0) -> bool:
        """Whether it has, waiting for it. (Where the system has no pidfds, nobody can tell: it is taken to have.)"""
        if self._pidfd is not None and select.select([self._pidfd], [], [], timeout_secs)[0]:
            os.close(self._pidfd)
            self._pidfd = None
        return self._pidfd is None

    def checkpoints(self) -> tuple[set[int], set[int]]:
        """The steps whose checkpoints are there, and those of them that have come, or been replaced, since the kill."""
        files = self._files()
        return set(files), {step for step, file in files.items() if file != self._files_at_the_kill.get(step)}

    def _files(self) -> dict[int, _File]:
        found = {}
        for file in self._checkpoints.glob("*/checkpoint_0.pt"):
            step = step_of(file.parent.name)
            if step is not None:
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    found[step] = (status.st_ino, status.st_mtime_ns)
        return found
