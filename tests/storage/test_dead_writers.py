"""Processes that are killed while they write, and processes that are not: real ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lastgood.storage.local import LocalStorage

SIZE = (1 << 20) + 100
PHASES = ("started", "begun", "half written", "durable", "committed")


class Writer:
    """A process of ``writer_process.py``."""

    def __init__(self, path: Path, fill: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "tests.storage.writer_process", str(path), str(fill), str(SIZE)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reached = ""

    def reach(self, phase: str) -> None:
        """Let it run up to the end of this phase."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        while self._reached != phase:
            if self._reached:
                self.process.stdin.write("go on\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
            assert line, f"the writer ended after {self._reached!r}"
            self._reached = line.strip()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(60) == -signal.SIGKILL


@contextmanager
def writer(path: Path, fill: int) -> Iterator[Writer]:
    started = Writer(path, fill)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def temporaries(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


@pytest.mark.parametrize("phase", ["begun", "half written", "durable"])
def test_a_writer_killed_in_the_middle_leaves_the_old_file_and_one_temporary(tmp_path: Path, phase: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with writer(path, 1) as killed:
        killed.reach(phase)
        killed.kill()
    assert path.read_bytes() == b"old"
    assert len(temporaries(tmp_path)) == 1
    LocalStorage().put(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_the_next_begin_clears_what_the_dead_left_and_not_what_the_living_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with ExitStack() as stack:
        dead, alive, of_another_name = (
            stack.enter_context(writer(target, fill))
            for fill, target in enumerate((path, path, tmp_path / "file.other"), 1)
        )
        seen: set[str] = set()
        temporary_of = {}
        for process in (dead, alive, of_another_name):
            process.reach("half written")
            (temporary_of[process],) = set(temporaries(tmp_path)) - seen
            seen = set(temporaries(tmp_path))
        dead.kill()
        of_another_name.kill()
        assert set(temporaries(tmp_path)) == seen

        write = LocalStorage().begin(str(path), 3)
        assert temporary_of[dead] not in temporaries(tmp_path)
        assert temporary_of[alive] in temporaries(tmp_path)
        assert temporary_of[of_another_name] in temporaries(tmp_path)  # the next save of that name clears it
        write.abort()
        assert path.read_bytes() == b"old"

        alive.reach("committed")
        assert path.read_bytes() == bytes([2]) * SIZE


def test_a_committed_file_stays_when_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new directory" / "file"
    with writer(path, 7) as killed:
        killed.reach("committed")
        killed.kill()
    assert path.read_bytes() == bytes([7]) * SIZE
    assert os.listdir(path.parent) == ["file"]
