"""System calls of a running process, seen and spoilt from outside, by strace."""

import contextlib
import functools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.workers import PATIENCE_SECS, Worker

SYSTEM_CALLS = (
    *("openat", "pwrite64", "pread64", "preadv", "preadv2", "fsync", "fdatasync", "fallocate", "ftruncate"),
    *(
        "link",
        "linkat",
        "rename",
        "renameat",
        "renameat2",
        "unlink",
        "unlinkat",
        "rmdir",
        "mkdir",
        "flock",
        "getdents64",
        "close",
    ),
)
"""Those by which lastgood changes and reads files. Asking for the status of one is left to other tests."""

_DETACH_SECS = 10.0

_ENTRY = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<arguments>.*)")


class Call(NamedTuple):
    """A system call on a file. Paths are those below the directory that is watched, ``.`` for itself."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@functools.cache
def why_not() -> str | None:
    """Why no process can be traced here, if none can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    worker = Worker()
    try:
        with traced(worker.pid, ["-e", "trace=none"]):
            return None
    except CannotAttach as error:
        return f"strace may not attach to a process here: {error}"
    finally:
        worker.kill()


class CannotAttach(Exception):
    """strace has ended before it was attached, with these words."""


@contextlib.contextmanager
def traced(pid: int, options: Sequence[str]) -> Iterator[None]:
    """All threads of the process are traced while the block runs, from its first line on."""
    command = ["strace", "-f", "-p", str(pid), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        try:
            said = strace.stderr.readline()
            if "attached" not in said:
                raise CannotAttach(said + strace.stderr.read())
            yield
        finally:
            # What it says of each new thread has room in the pipe.
            strace.terminate()
            try:
                strace.communicate(timeout=_DETACH_SECS)
            except subprocess.TimeoutExpired:
                # It waits for ever, at times, for threads of a process that has been killed.
                strace.kill()
                strace.communicate(timeout=PATIENCE_SECS)


@contextlib.contextmanager
def noted(pid: int, log: Path) -> Iterator[None]:
    """Its calls are written to the log, for :func:`calls_in`."""
    with traced(pid, ["-y", "-o", str(log), "-e", f"trace={','.join(SYSTEM_CALLS)}"]):
        yield


def path_below(directory: Path) -> re.Pattern[str]:
    """Finds the first path in a call's arguments that is the directory or below it: there it is called ``path``."""
    return re.compile(rf'["<]{re.escape(str(directory))}(?:/(?P<path>[^">]*))?[">]')


def calls_in(log: Path, directory: Path) -> dict[Call, int]:
    """The calls on files below the directory, and how often one thread has made each: the most of all threads."""
    below = path_below(directory)
    counts: Counter[tuple[str, Call]] = Counter()
    for line in log.read_text().splitlines():
        entry = _ENTRY.match(line)
        found = None if entry is None else below.search(entry["arguments"])
        if entry is not None and found is not None:
            counts[entry["thread"], Call(entry["name"], found["path"] or ".")] += 1
    most: dict[Call, int] = {}
    for (_, call), count in counts.items():
        most[call] = max(count, most.get(call, 0))
    return most


def injecting(log: Path, directory: Path, call: Call, what: str) -> list[str]:
    """Options for :func:`traced`: ``what`` (as of strace's ``inject``) happens to calls on this path.

    :func:`was_injected` finds in the log whether it did.
    """
    path = directory if call.path == "." else directory / call.path
    return ["-P", str(path), "-o", str(log), "-e", f"trace={call.name}", "-e", f"inject={call.name}:{what}"]


def was_injected(log: Path) -> bool:
    """Whether a call was spoilt, or never came back. (That it killed the process, whoever holds that knows.)"""
    text = log.read_text()
    return "(INJECTED)" in text or "<detached" in text or text.count("<unfinished") > text.count("resumed>")


class TracedWorker(Worker):
    """A process whose system calls, or those of another one, may be watched or spoilt when it says so.

    Its function gets orders from its pipe, ``None`` as the last of them.
    """

    def send(self, order: Any) -> None:
        self._pipe.send(order)

    def told(self) -> Iterator[tuple[str, Any]]:
        """What the function sends until it says that it is done, or until the process is dead."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while (said := self.receive()) != "done":
                if said[0] == "raised":
                    raise said[1]
                yield said
