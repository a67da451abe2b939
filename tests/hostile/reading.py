"""All that reads checkpoints, let loose on one checkpoint: how each of them ends, in a worker that is watched.

A worker has an audit hook: whatever a file makes Python run, import, start, connect to or write is noted. Its address
space is limited, so that a large allocation fails even if nothing touches it, and its resident memory is measured.
"""

import contextlib
import ctypes
import importlib
import io
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.unit.capture.comparing import Comparison

import lastgood
from lastgood._contents import open_contents, tensors, verify_checkpoint
from lastgood._contents.model import Contents
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.cli import main
from lastgood.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RankMismatchError,
    TargetMismatchError,
    UncommittedCheckpointError,
    UnsafeCheckpointError,
)
from lastgood.manager.catalog import Condition, Entry, read_entry
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

STEP = 5
MEBIBYTE = 1024 * 1024
SPARE = 64 * MEBIBYTE
SECONDS = 10.0
"""Of processor time that one way of reading may take; the largest files of these tests have a few hundred kilobytes."""

REFUSALS = (CorruptCheckpointError, UnsafeCheckpointError, CheckpointNotFoundError, UncommittedCheckpointError)
TARGETS_REFUSED = (TargetMismatchError, RankMismatchError)
"""What a file may say that is well made and holds something else than a target, or other ranks, expect."""

NO_DEVICE = "a device that is not here"
"""What stands for torch's own error where tensors were saved from such a one: no fault of the file's."""

_NO_SUCH_DEVICE = ("Attempting to deserialize object on", "don't know how to restore data location")

_ADDRESSES = SPARE + 12 * 8 * MEBIBYTE
"""How much more address space than before a load may take: memory that it may use, and the stacks of its threads."""

_WATCHED = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.dlopen", "shutil.", "pty.", "open")
_IMPORTED_LATE = ("rich.cells", "rich.console", "rich.text", "encodings.cp437", "encodings.unicode_escape")
"""What Python and the command import only where they need it."""

_HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.fwalk", "os.walk")


class Outcome(NamedTuple):
    """How one way of reading ended: ``error`` is empty, the name of one of our errors, or "raw" and another's name.

    ``same``: what came out is what came out of the untouched checkpoint.
    """

    way: str
    error: str
    message: str
    tensor: str | None
    same: bool


class Reading(NamedTuple):
    """How all ways ended, the memory of the dearest one, the time of the slowest, and what was done meanwhile."""

    outcomes: list[Outcome]
    memory: int
    seconds: float
    events: list[str]

    def of(self, way: str) -> Outcome:
        """How this way ended."""
        return next(outcome for outcome in self.outcomes if outcome.way == way)


# In the worker

_noted: list[str] | None = None
_expected: dict[str, dict[str, Any]] = {}
_is_watched = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _noted is None or not event.startswith(_WATCHED) or event in _HARMLESS:
        return
    if event == "open" and (not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    _noted.append(f"{event} {arguments!r}"[:300])


def _prepare() -> None:
    global _is_watched
    if _is_watched:
        return
    _is_watched = True
    # One heap for all threads, and small stacks: what is reserved for them says nothing of a file.
    arena_max = -8
    ctypes.CDLL(None).mallopt(arena_max, 1)
    threading.stack_size(MEBIBYTE)
    torch.set_num_threads(1)
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        theirs = io.BytesIO()
        torch.save({"a": torch.eye(2).to_sparse()}, theirs, **options)
        theirs.seek(0)
        torch.load(theirs, weights_only=True)
    sys.addaudithook(_watch)


def _command(*words: str) -> str:
    """What the command prints. Raises where it ends with a defect, which it would not show otherwise."""
    output, errors = io.StringIO(), io.StringIO()
    arguments, sys.argv = sys.argv, ["lastgood", *words]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as ended:
        if "a defect in lastgood" in errors.getvalue():
            raise RuntimeError(errors.getvalue()) from None
        if ended.code:
            raise CorruptCheckpointError(output.getvalue() + errors.getvalue()) from None
    finally:
        sys.argv = arguments
    return "\n".join(line for line in output.getvalue().splitlines() if " ago)" not in line)


def _verified(path: str) -> None:
    report = verify_checkpoint(path)
    if not report.is_good:
        first = report.problems[0]
        raise CorruptCheckpointError(f"{first.file}: {first.message}", path=first.file, tensor=first.tensor)


def _seen(path: str) -> tuple[Contents, Any]:
    contents = open_contents(path)
    return contents, [list(tensors(file)) for file in contents.files]


def _zeros(value: Any) -> Any:
    """A target like a value: tensors to be filled, and nothing where something is to be made."""
    if isinstance(value, dict):
        return {key: _zeros(item) for key, item in value.items()}
    is_plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_conj()
    return torch.zeros_like(value.detach()) if is_plain else None


def _ways(directory: str, ranks: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All ways of reading the checkpoint, those of its first file alone included."""
    known = _expected.get(directory, {})
    file = os.path.join(directory, "checkpoint_0.pt")
    reader = CheckpointReader(RankInfo(0, ranks))
    yield "load", lambda: reader.read(directory, verify_whole=True)[0]
    yield "verify", lambda: _verified(directory)
    yield "inspect", lambda: _seen(directory)
    yield "entry", lambda: _entry(directory, known.get("entry"))
    yield "load in place", lambda: reader.read(directory, _zeros(known.get("load")))[0]
    yield "load keys", lambda: reader.read(directory, dict.fromkeys(known.get("load") or ()))[0]
    if ranks > 1:
        other = CheckpointReader(RankInfo(1, ranks))
        yield "load rank 1", lambda: other.read(directory, verify_whole=True)[0]
        alone = CheckpointReader(RankInfo(0, 1))
        yield "load elsewhere", lambda: alone.read(directory, verify_whole=True, per_rank={"*": "first"})[0]
    else:
        yield "load file", lambda: lastgood.load(file)
        yield "load unverified", lambda: lastgood.load(file, verify=False)
        yield "map", lambda: lastgood.load(file, mmap=True)
        yield "verify file", lambda: _verified(file)
    yield "command inspect", lambda: _command("inspect", "--all", directory)
    yield "command inspect as JSON", lambda: _command("inspect", "--json", directory)


def _entry(directory: str, known: Entry | None) -> Entry:
    """What a run's catalog says; raises where it does not count the checkpoint as one, unless it never did."""
    entry = read_entry(LocalStorage(), os.path.dirname(directory), STEP)
    is_theirs = entry.condition is Condition.FOREIGN and (known is None or known.condition is Condition.FOREIGN)
    if not (entry.is_committed or is_theirs):
        raise CorruptCheckpointError(f"{entry.path}: {entry.problem}", path=directory)
    return entry


def learn(directory: str, ranks: int) -> None:
    """Read the checkpoint while it is whole: what comes out of damaged ones is compared with this."""
    _prepare()
    _expected.pop(directory, None)
    for _ in range(2):  # the second time, to be quite sure that all that is imported late has been
        _expected[directory] = {way: attempt() for way, attempt in _ways(directory, ranks)}
    with contextlib.suppress(Exception):
        _command("inspect", directory + " which is not there")


def read(directory: str, ranks: int, ways: tuple[str, ...] = ()) -> Reading:
    """Read the checkpoint in all ways, or in those named, after :func:`learn`."""
    global _noted
    chosen = [(way, attempt) for way, attempt in _ways(directory, ranks) if not ways or way in ways]
    size = sum(file.stat().st_size for file in Path(directory).iterdir())
    outcomes, seconds = [], 0.0
    Path("/proc/self/clear_refs").write_text("5")
    resident = _memory("VmHWM")
    _noted = noted = []
    for way, attempt in chosen:
        started = time.process_time()
        with _little_memory(size):
            outcome = _outcome(way, attempt, _expected[directory].get(way))
        outcomes.append(outcome)
        seconds = max(seconds, time.process_time() - started)
    _noted = None
    return Reading(outcomes, _memory("VmHWM") - resident, seconds, noted)


def _outcome(way: str, attempt: Callable[[], Any], expected: Any) -> Outcome:
    try:
        found = attempt()
    except (*REFUSALS, *TARGETS_REFUSED) as error:
        return Outcome(way, type(error).__name__, str(error), error.tensor, False)
    except BaseException as error:
        if type(error) is RuntimeError and any(words in str(error) for words in _NO_SUCH_DEVICE):
            return Outcome(way, NO_DEVICE, str(error), None, False)
        return Outcome(way, f"raw {type(error).__name__}", str(error)[:2000], None, False)
    return Outcome(way, "", "", None, _is_same(found, expected))


def _is_same(found: Any, expected: Any) -> bool:
    if isinstance(found, tuple) and found and isinstance(found[0], Contents):
        return _described(found[0]) == _described(expected[0]) and bool(found[1] == expected[1])
    if isinstance(found, str | Entry):
        return bool(found == expected)
    try:
        Comparison().same(found, expected)
    except (AssertionError, RuntimeError):
        return False
    return True


def _described(contents: Contents) -> Any:
    """All that is said of the values; not where their bytes stand, which is the business of the loads."""
    return contents.manifest, [replace(file, nbytes=0, places=(), byteorder="") for file in contents.files]


@contextlib.contextmanager
def _little_memory(size: int) -> Iterator[None]:
    mapped = _memory("VmSize")
    before = resource.getrlimit(resource.RLIMIT_AS)
    # A file may be mapped once, and copied once more than it is loaded while nothing but its size is known.
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * size + _ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])
