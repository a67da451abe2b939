"""The real program, whose system calls fail: errors that strace puts in their place, and deaths at them.

Which calls there are is found by watching the program once; then each of them fails in each way, on each file.
"""

import abc
import errno
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from tests.crash.faults import programs
from tests.crash.faults.action import leftovers, names
from tests.crash.faults.programs import Outcome
from tests.crash.faults.tracing import Call, TracedWorker, calls_in, injecting, noted, traced, was_injected, why_not
from tests.helpers.saves import assert_state, read
from tests.manager.runs import ELEMENTS, directories, manager_of, restore, tiny

import lastgood
from lastgood.errors import CheckpointNotFoundError
from lastgood.manager.retention import KeepLast

pytestmark = pytest.mark.long

HANGS, DIES = "hangs", "dies"
NEVER_SECS = 1000
PATIENT_SECS, IMPATIENT_SECS, LONG_SECS = 3.0, 0.7, 600.0

DEADLY = ("fsync", "rename", "renameat2", "link", "linkat", "unlink", "mkdir", "rmdir", "pwrite64", "fallocate")
"""Where a death is worth a trial: at calls that change what is on disk."""

CONTINUED = ("pwrite64", "pread64", "preadv", "preadv2", "fsync", "fallocate", "ftruncate", "flock")
"""What is begun again, by Python or by lastgood, where a signal has interrupted it: nobody may notice."""

FILE = "checkpoint_0.pt"


class Case(NamedTuple):
    """What happens to the nth call of each thread on one path: an errno's name, :data:`HANGS` or :data:`DIES`."""

    call: Call
    what: str
    number: int

    def options(self, log: Path, root: Path) -> list[str]:
        how = {HANGS: f"delay_enter={NEVER_SECS}s", DIES: "signal=KILL"}.get(self.what, f"error={self.what}")
        return injecting(log, root, self.call, f"{how}:when={self.number}")

    @property
    def timeouts_secs(self) -> tuple[float, float]:
        """What a call may take in a save, and in what has no configuration.

        Who has to wait for a lock that will never be free waits for the first of them.
        """
        return (IMPATIENT_SECS, IMPATIENT_SECS) if self.what == HANGS else (PATIENT_SECS, LONG_SECS)

    @property
    def is_harmless(self) -> bool:
        return self.what == "EINTR" and self.call.name in CONTINUED

    @property
    def spoils_a_save(self) -> bool:
        """It must not go unnoticed."""
        is_write = self.call.name in ("pwrite64", "fsync", "rename") and self.call.path.endswith(".tmp")
        return is_write and self.what not in (HANGS, DIES) and not self.is_harmless

    def judge(self, outcome: Outcome, root: Path) -> None:
        """It went well, or was lastgood's own error, which says where and why."""
        if outcome.went_well:
            return
        assert not self.is_harmless, outcome
        assert outcome.is_lastgoods, outcome
        assert str(root) in outcome.message, outcome
        assert str(outcome.path).startswith(str(root)), outcome
        if self.what == HANGS:
            assert f"{IMPATIENT_SECS:g} s" in outcome.message, outcome
        # A lock that somebody holds is no error of the system's; where no checkpoint can be read, each has its own.
        elif self.what != DIES and outcome.error != "CorruptCheckpointError" and self.call.name != "flock":
            assert getattr(errno, self.what) in outcome.causes, outcome


def cases_of(calls: dict[Call, int], rng: random.Random) -> list[Case]:
    """What happens to the first three calls of a name on each path: EIO, an interruption, one of the other errors, and
    a death where it is worth a trial.
    """
    cases = []
    for call, count in sorted(calls.items()):
        for number in range(1, min(3, count) + 1):
            kinds = ["EIO", "EINTR", rng.choice(("ENOSPC", "EDQUOT", "EAGAIN")), *[DIES] * (call.name in DEADLY)]
            cases += [Case(call, kind, number) for kind in kinds]
    return cases


def hangs_of(calls: dict[Call, int]) -> list[Case]:
    """The first call of a name on each path does not come back; to be closed, no file that was read may hang."""
    return [Case(call, HANGS, 1) for call in sorted(calls)]


class Program(abc.ABC):
    """A program that is tried with all cases, in one process as long as that lives. ``directory`` is its own."""

    function: ClassVar[Callable[..., None]]

    def __init__(self, directory: Path) -> None:
        why = why_not()
        if why is not None:
            pytest.skip(why)
        self._directory = directory
        self._template = directory / "template"
        self._template.mkdir()
        self.prepare(self._template)
        self._worker: TracedWorker | None = None

    @abc.abstractmethod
    def prepare(self, root: Path) -> None:
        """What is there before."""

    @abc.abstractmethod
    def look(self, root: Path, outcomes: dict[str, Outcome]) -> None:
        """What was acknowledged is there, and so is what was there before."""

    @abc.abstractmethod
    def go_on_without(self, root: Path) -> None:
        """What another process does after the death of this one."""

    @abc.abstractmethod
    def assert_went_on(self, root: Path) -> None:
        """The saves after all that are good, and nothing else is left."""

    def calls(self) -> dict[Call, int]:
        """The calls that there are, found by watching the program once, and how often a thread makes each of them."""
        log = self._directory / "calls"
        root = self._root("watched")
        worker = self._living_worker()
        pid = self._begin(worker, root, PATIENT_SECS, LONG_SECS)
        with noted(pid, log):
            worker.send("go on")
            outcomes = dict(worker.told())
        worker.send("go on")
        worker.receive()
        assert all(outcome.went_well for outcome in outcomes.values()), outcomes
        return calls_in(log, root)

    def run(self, cases: Sequence[Case]) -> int:
        """Try them; how many took place."""
        problems, met = [], 0
        for number, case in enumerate(cases):
            root, log = self._root(str(number)), self._directory / "log"
            try:
                met += self._try(case, root, log)
            except Exception as problem:
                self.close()
                problem.add_note(str(case))
                problems.append(problem)
            shutil.rmtree(root)
        if problems:
            raise ExceptionGroup(f"{len(problems)} of {len(cases)} cases", problems)
        return met

    def _root(self, name: str) -> Path:
        root = self._directory / name
        shutil.copytree(self._template, root)
        return root

    def _living_worker(self) -> TracedWorker:
        if self._worker is None:
            self._worker = TracedWorker()
            elsewhere = self._directory / f"elsewhere-{self._worker.pid}"
            self._worker.start(type(self).function, elsewhere, with_pipe=True)
        return self._worker

    def close(self) -> None:
        """End the process."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()

    def _begin(self, worker: TracedWorker, root: Path, timeout_secs: float, other_timeouts_secs: float) -> int:
        """Let it come to where its calls count; the number of the process that makes them."""
        worker.send((root, timeout_secs, other_timeouts_secs))
        pid = worker.receive()
        assert isinstance(pid, int), pid
        return pid

    def _try(self, case: Case, root: Path, log: Path) -> bool:
        worker = self._living_worker()
        pid = self._begin(worker, root, *case.timeouts_secs)
        with traced(pid, case.options(log, root)):
            worker.send("go on")
            outcomes = dict(worker.told())
        for outcome in outcomes.values():
            case.judge(outcome, root)
        spoilt = case.spoils_a_save and was_injected(log)
        assert not (spoilt and all(outcome.went_well for outcome in outcomes.values())), "an error was ignored"
        self.look(root, outcomes)
        report = self._go_on(worker, case, root)
        self.assert_went_on(root)
        if case.call.name != "close":  # strace leaves open what could not be closed
            assert report.get("open", []) == []
        return was_injected(log) or report.get("died", False)

    def _go_on(self, worker: TracedWorker, case: Case, root: Path) -> dict[str, Any]:
        try:
            worker.send("go on")
            report = worker.receive()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            assert case.what == DIES
            self.close()
            self.go_on_without(root)
            return {"died": True}
        if isinstance(report, tuple):
            raise report[1]
        assert isinstance(report, dict)
        return report


class Run(Program):
    """A manager resumes, saves, removes what is old; and a file is saved and loaded."""

    function = programs.run

    def prepare(self, root: Path) -> None:
        programs.prepare_run(root)

    def look(self, root: Path, outcomes: dict[str, Outcome]) -> None:
        def went_well(name: str) -> bool:
            return name in outcomes and outcomes[name].went_well

        with manager_of(root) as manager:
            step, state = restore(manager)
        assert step == 4 or (step == 3 and not went_well("save and prune"))
        third = read(root / "step-3")
        assert third["step"] in ((programs.ANEW,) if went_well("save anew") else (3, programs.ANEW))
        assert_state(third, third["step"], ELEMENTS)
        assert_state(state, third["step"] if step == 3 else 4, ELEMENTS)
        if step == 3:
            assert_state(read(root / "step-2"), 2, ELEMENTS)
        file = lastgood.load(root / "state.pt")
        assert file["step"] in ((2,) if went_well("lastgood.save") else (1, 2))
        assert_state(file, file["step"], ELEMENTS)

    def go_on_without(self, root: Path) -> None:
        with manager_of(root, keep=KeepLast(2)) as manager:
            for step in (5, 6):
                manager.save(step, tiny(step)).result(0)
                manager.wait()
        lastgood.save(tiny(3), root / "state.pt")

    def assert_went_on(self, root: Path) -> None:
        assert directories(root) == ["state.pt", "step-5", "step-6"]
        for step in (5, 6):
            assert names(root / f"step-{step}") == [FILE]
            assert_state(read(root / f"step-{step}"), step, ELEMENTS)
        assert leftovers(root) == []
        assert_state(lastgood.load(root / "state.pt"), 3, ELEMENTS)


class CheckpointProcess(Program):
    """What fails are calls of a checkpoint process; if it dies, the next save starts another one."""

    function = programs.run_in_background

    def prepare(self, root: Path) -> None:
        """Nothing: the first checkpoint is the program's own."""

    def look(self, root: Path, outcomes: dict[str, Outcome]) -> None:
        assert list(outcomes) == list(programs.SAVED)
        for (name, outcome), earlier in zip(outcomes.items(), (1, None), strict=True):
            try:
                found = read(root / name)
            except CheckpointNotFoundError:
                assert earlier is None
                assert not outcome.went_well
                continue
            assert found["step"] == programs.SAVED[name] or (found["step"] == earlier and not outcome.went_well)
            assert_state(found, found["step"])

    def go_on_without(self, root: Path) -> None:
        raise AssertionError("the trainer has died with its checkpoint process")

    def assert_went_on(self, root: Path) -> None:
        for name in programs.SAVED:
            assert_state(read(root / name), 4)
            assert names(root / name) == [FILE]
        assert leftovers(root) == []


@pytest.fixture
def tried(program: type[Program], tmp_path: Path) -> Iterator[Program]:
    made = program(tmp_path)
    yield made
    made.close()


PROGRAMS = pytest.mark.parametrize("program", [Run, CheckpointProcess])
COUNTED = "faults and deaths at system calls of the real program"
HANGING = "system calls of the real program that do not come back"


@PROGRAMS
def test_a_failing_system_call_is_harmless_or_a_clear_error(
    tried: Program, rng_seed: int, count_cases: Callable[[str, int], None]
) -> None:
    rng = random.Random(rng_seed)
    count_cases(COUNTED, tried.run(rng.sample(cases_of(tried.calls(), rng), 15)))


@pytest.mark.crash
@pytest.mark.timeout(1200)
@PROGRAMS
def test_every_failing_system_call(tried: Program, rng_seed: int, count_cases: Callable[[str, int], None]) -> None:
    rng = random.Random(rng_seed)
    calls = tried.calls()
    assert {"openat", "pwrite64", "fsync", "rename", "unlink", "flock", "close"} <= {call.name for call in calls}
    count_cases(COUNTED, tried.run(cases_of(calls, rng)))
    count_cases(HANGING, tried.run(rng.sample(hangs_of(calls), 15)))
