"""Faults of file operations, one at a time, under everything that lastgood does with files."""

import contextlib
import errno
import logging
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.crash.faults.action import Action, Reported, drop_all_from_page_cache
from tests.crash.faults.faults import (
    CHANGES,
    ERRORS,
    IMPATIENCE_SECS,
    LOST_ANSWER,
    NEVER_RETURNS,
    NOTHING_RETURNS,
    NOTHING_WORKS,
    RETURNS_LATE,
    SHORT,
    STALLS,
    Fault,
)
from tests.distributed.barrier_ranks import start
from tests.helpers.asynchronous import open_files
from tests.helpers.workers import PATIENCE_SECS

from lastgood.errors import CorruptCheckpointError, LastgoodError, StorageError
from lastgood.testing.fault_file_ops import TRANSFERS, FaultFileOps, Stall


@dataclass(frozen=True)
class Setting:
    """An action, and how the file system is: with direct I/O or without, the files in the page cache or not."""

    action: type[Action]
    has_direct_io: bool = True
    is_cold: bool = True

    def __str__(self) -> str:
        direct = "" if self.has_direct_io else ", buffered"
        return f"{self.action.name}{direct}" + ("" if self.is_cold else ", warm")

    def operations(self) -> FaultFileOps:
        ops = FaultFileOps()
        if not self.has_direct_io:
            ops.fail("open_direct", errno.EINVAL, lasting=True)
        return ops

    def directory(self, template: Path, directory: Path) -> Path:
        """Where to act: a copy of what was prepared, if acting changes anything."""
        if self.action.only_reads:
            if self.is_cold:
                drop_all_from_page_cache(template)
            return template
        shutil.copytree(template, directory)
        return directory


class Trial:
    """All faults of one setting. ``template`` is an empty directory, ``directory`` one for what is changed."""

    def __init__(self, setting: Setting, template: Path, directory: Path) -> None:
        self._setting = setting
        self._template = template
        self._directory = directory
        setting.action().prepare(template)
        self._calls = self._calls_without_faults()

    def _calls_without_faults(self) -> list[str]:
        ops = self._setting.operations()
        action = self._setting.action()
        root = self._setting.directory(self._template, self._directory / "without")
        action.act(root, ops)
        calls = ops.calls
        action.look(root, None)
        action.go_on(root)
        action.assert_acknowledged(root)
        action.assert_tidy(root)
        action.close()
        return calls

    def faults(self) -> list[Fault]:
        """Every kind at the first three calls of each operation and at the last one."""
        found = []
        for operation in sorted(set(self._calls)):
            if operation == "open_direct" and not self._setting.has_direct_io:
                continue
            kinds = [*ERRORS, NEVER_RETURNS if self._setting.action.only_reads else RETURNS_LATE]
            kinds += [LOST_ANSWER] * (operation in CHANGES) + [*SHORT] * (operation in TRANSFERS)
            count = self._calls.count(operation)
            calls = sorted({1, 2, 3, count} & set(range(1, count + 1)))
            found += [Fault(kind, operation, call) for kind in kinds for call in calls]
            if RETURNS_LATE in kinds:
                found.append(Fault(NEVER_RETURNS, operation, 1))
        return found

    def hiccups_of_the_device(self) -> list[Fault]:
        """Each call fails, one at a time."""
        return [Fault("EIO", None, call) for call in range(1, len(self._calls) + 1)]

    def ends_of_the_device(self) -> list[Fault]:
        """From each call on, nothing works any more."""
        return [Fault(NOTHING_WORKS, None, call) for call in range(1, len(self._calls) + 1)]

    def silences_of_the_device(self) -> list[Fault]:
        """From each call on, nothing comes back any more."""
        return [Fault(NOTHING_RETURNS, None, call) for call in range(1, len(self._calls) + 1)]

    def run(self, faults: Sequence[Fault]) -> int:
        """Try them all; how many took place. Raises what went wrong with all of them together."""
        problems, met = [], 0
        for number, fault in enumerate(faults):
            try:
                met += self._try(fault, self._directory / str(number))
            except Exception as problem:
                problem.add_note(f"{self._setting}: {fault}")
                problems.append(problem)
            shutil.rmtree(self._directory / str(number), ignore_errors=True)
        if problems:
            raise ExceptionGroup(f"{self._setting}: {len(problems)} of {len(faults)} faults", problems)
        return met

    def _try(self, fault: Fault, directory: Path) -> bool:
        """Whether it took place: where several threads are at work, an operation may be called once less by chance."""
        root = self._setting.directory(self._template, directory)
        ops, action = self._setting.operations(), self._setting.action()
        stall = fault.plan(ops)
        threads, open_before = set(threading.enumerate()), descriptors_below(root)
        with failures_in_the_background() as background:
            try:
                with patience(action, fault):
                    failure = in_time(lambda: failure_of(lambda: action.act(root, ops)))
                self._judge(fault, failure, ops, root)
                assert_threads_end(threads, stall)
                action.look(root, failure)
                # The call that hangs may keep the next save from its lock, with an error that says so.
                went_on = fault.kind == RETURNS_LATE and failure_of(lambda: action.go_on(root)) is None
                ops.heal()
                assert_threads_end(threads)
                if went_on:
                    action.assert_acknowledged(root)
            finally:
                ops.heal()
            go_on(action, root, fault)
            action.assert_acknowledged(root)
            action.assert_tidy(root)
            action.close()
        assert background == []
        assert_threads_end(threads)
        assert descriptors_below(root) == open_before
        return ops.faults > 0

    def _judge(self, fault: Fault, failure: LastgoodError | None, ops: FaultFileOps, root: Path) -> None:
        if failure is None:
            is_lost = fault.operation in self._setting.action.indispensable and fault.kind in (*ERRORS, LOST_ANSWER)
            assert not ops.faults or not is_lost or fault.is_harmless, "an error was ignored"
            return
        assert ops.faults or fault.kind in STALLS, "it failed without a fault"
        assert not fault.is_harmless, failure
        assert str(root) in str(failure)
        assert failure.path is not None
        assert failure.path.startswith(str(root))
        assert any(word in str(failure) for word in fault.words), failure
        # Where no checkpoint can be read, each has a cause of its own; they are told in words.
        is_summary = isinstance(failure, (Reported, CorruptCheckpointError)) or (
            isinstance(failure, StorageError) and str(failure).startswith("none of the checkpoints under")
        )
        if fault.kind not in STALLS and not is_summary:
            assert ERRORS.get(fault.kind, errno.EIO) in errors_that_caused(failure)


def failure_of(ask: Callable[[], None]) -> LastgoodError | None:
    """What lastgood raises; anything else comes through, and fails the test."""
    try:
        ask()
    except LastgoodError as error:
        return error
    return None


def in_time(ask: Callable[[], LastgoodError | None]) -> LastgoodError | None:
    """What it returns. On a thread of its own: what waits for ever fails its test, and does not end all tests."""
    outcome = start(ask)
    try:
        return outcome.result(PATIENCE_SECS)
    except TimeoutError:
        assert outcome.done(), "it waits for ever"
        raise


def go_on(action: Action, root: Path, fault: Fault) -> None:
    """Now it goes well; but those that were made to be impatient may be so without a reason, on a busy machine."""
    for _ in range(5):
        failure = failure_of(lambda: action.go_on(root))
        if failure is None:
            return
        if fault.kind not in STALLS or f"{IMPATIENCE_SECS:g} s" not in str(failure):
            raise failure
    raise AssertionError("it never goes well again") from failure


def errors_that_caused(failure: BaseException) -> set[int | None]:
    """The errnos of the operating system's errors behind it."""
    found = set()
    error: BaseException | None = failure
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, LastgoodError):
            found.add(error.errno)
        error = error.__cause__
    return found


@contextlib.contextmanager
def patience(action: Action, fault: Fault) -> Iterator[None]:
    """Do not wait for ten minutes where something never comes back."""
    with pytest.MonkeyPatch.context() as patch:
        if fault.kind in STALLS:
            action.timeout_secs = IMPATIENCE_SECS
            bound_all_waits(IMPATIENCE_SECS, patch.setattr)
        yield


def bound_all_waits(secs: float, set_attribute: Callable[..., None] = setattr) -> None:
    """What waits of lastgood that have no configuration take at most, from now on."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lastgood.") and hasattr(module, "NO_PROGRESS_TIMEOUT_SECS"):
            set_attribute(module, "NO_PROGRESS_TIMEOUT_SECS", secs)


@contextlib.contextmanager
def failures_in_the_background() -> Iterator[list[BaseException]]:
    """What threads that nobody waits for have met and only logged, if it is none of lastgood's errors."""
    found: list[BaseException] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            if error is not None and not isinstance(error, LastgoodError):
                found.append(error)

    logger, listener = logging.getLogger("lastgood"), Listener()
    logger.addHandler(listener)
    try:
        yield found
    finally:
        logger.removeHandler(listener)


def assert_threads_end(before: set[threading.Thread], stall: Stall | None = None) -> None:
    """All threads that came later end by themselves, but those that hang, and the one that tidies up after saves."""
    deadline = time.monotonic() + PATIENCE_SECS
    may_stay = before | set([] if stall is None else stall.threads)

    def others() -> list[threading.Thread]:
        found = [thread for thread in threading.enumerate() if thread not in may_stay]
        return [thread for thread in found if thread.name != "lastgood-housekeeping"]

    while waited_for := others():
        assert time.monotonic() < deadline, f"threads that do not end: {waited_for}"
        with contextlib.suppress(RuntimeError):  # it is just being started
            waited_for[0].join(PATIENCE_SECS)


def descriptors_below(root: Path) -> list[str]:
    """What this process has open there."""
    return [name for name in open_files().values() if name.startswith(f"{root}/") or name == str(root)]


def some(faults: Sequence[Fault], count: int, rng: random.Random) -> list[Fault]:
    """A few of them: of every operation one, as far as the number goes."""
    chosen: list[Fault] = []
    rest = list(faults)
    rng.shuffle(rest)
    while rest and len(chosen) < count:
        seen: set[str | None] = set()
        for fault in list(rest):
            if fault.operation not in seen and len(chosen) < count:
                seen.add(fault.operation)
                chosen.append(fault)
                rest.remove(fault)
    return chosen
