"""Runs with saves, failures, damage, rewinds, restarts and rules in any order: the last good checkpoint is found."""

import contextlib
import errno
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.helpers.saves import assert_state, contents
from tests.manager.runs import ELEMENTS, damage, file_of, manager_of, restore, tiny
from tests.storage.recording import RecordingFileOps

import lastgood
from lastgood.errors import CorruptCheckpointError, StorageError
from lastgood.manager.catalog import is_set_aside, read_catalog
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepBest, KeepEvery, KeepLast, KeepSteps, RetentionRule
from lastgood.storage.local import LocalStorage

RULES = st.lists(
    st.one_of(
        st.builds(KeepLast, st.integers(1, 3)),
        st.builds(KeepEvery, st.integers(2, 4)),
        st.builds(KeepBest, st.integers(1, 2), st.just("loss"), st.sampled_from(["min", "max"])),
        st.builds(KeepSteps, st.sets(st.integers(0, 8), min_size=1, max_size=2)),
    ),
    max_size=2,
)
METRICS = st.none() | st.fixed_dictionaries({"loss": st.floats(allow_nan=True, width=16)})
BEFORE_IT_IS_THERE = ["open_exclusive", "pwrite", "reserve", "fsync", "replace"]


class Run(RuleBasedStateMachine):
    """``good`` holds the number of the state of each step that is whole; ``ruined`` are steps that were damaged."""

    manager: CheckpointManager

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="lastgood-run-"))
        self.root = self.directory / "run"
        self.numbers = itertools.count(1)
        self.step = 0
        self.rules: list[RetentionRule] = []
        self.good: dict[int, int] = {}
        self.ruined: set[int] = set()
        self.left_alone: dict[str, bytes] = {}
        self.is_open = False

    @initialize(rules=RULES)
    def begin(self, rules: list[RetentionRule]) -> None:
        (self.root / "step-7.backup").mkdir(parents=True)
        (self.root / "step-7.backup" / "checkpoint_0.pt").write_bytes(b"somebody's")
        (self.root / "latest").write_text("step-7.backup")
        self.left_alone = contents(self.root)
        self._open(rules)

    def teardown(self) -> None:
        self._close()
        shutil.rmtree(self.directory)

    def _open(self, rules: list[RetentionRule]) -> None:
        self._close()
        self.rules, self.ops = rules, RecordingFileOps()
        self.manager = manager_of(self.root, ops=self.ops, keep=rules)
        self.is_open = True

    def _close(self) -> None:
        if self.is_open:
            self.is_open = False
            with contextlib.suppress(StorageError):  # that of a save that failed
                self.manager.close()

    def _committed(self) -> set[int]:
        return {entry.step for entry in read_catalog(LocalStorage(), str(self.root)).committed}

    # What happens

    @rule(ahead=st.integers(0, 3), metrics=METRICS)
    def save(self, ahead: int, metrics: dict[str, float] | None) -> None:
        self._save(self.step + ahead, metrics)

    def _save(self, step: int, metrics: dict[str, float] | None, *, tidies: bool = True) -> None:
        number, before = next(self.numbers), self._committed() | {step}
        self.manager.save(step, tiny(number), metrics).result(0)
        # What the rules see: all that was there, and this one.
        self.manager.wait()
        self.step, self.good[step] = step, number
        self.ruined.discard(step)
        after = self._committed()
        assert {step, max(before)} <= after <= before
        if not self.rules:
            assert after == before
        for steps in self.rules:
            if isinstance(steps, KeepLast):
                assert set(sorted(before)[-steps.count :]) <= after
            if isinstance(steps, KeepEvery):
                assert {kept for kept in before if kept % steps.steps == 0} <= after
            if isinstance(steps, KeepSteps):
                assert before & set(steps.steps) <= after
        if tidies and self.rules and all(isinstance(steps, KeepLast) for steps in self.rules):
            last = max(steps.count for steps in self.rules if isinstance(steps, KeepLast))
            assert after == {step, *sorted(before)[-last:]}
        self._forget(before - after)

    def _forget(self, steps: set[int]) -> None:
        for step in steps:
            self.good.pop(step, None)
            self.ruined.discard(step)
            assert not file_of(self.root, step).exists()

    @rule(ahead=st.integers(0, 2), operation=st.sampled_from(BEFORE_IT_IS_THERE))
    def fail_to_save(self, ahead: int, operation: str) -> None:
        before = self._files()
        self.ops.fail(operation, errno.ENOSPC if operation in ("pwrite", "reserve") else errno.EIO)
        with contextlib.suppress(StorageError):  # the third in a row
            assert self.manager.save(self.step + ahead, tiny(next(self.numbers))).exception(0)
        self.ops.heal(operation)
        with contextlib.suppress(StorageError):
            self.manager.wait()
        assert self._files() == before

    def _files(self) -> dict[str, bytes]:
        """All of checkpoints; temporaries of failed saves are none."""
        return {name: data for name, data in contents(self.root).items() if name.endswith("checkpoint_0.pt")}

    @rule(ahead=st.integers(0, 2))
    def fail_right_after_it_was_published(self, ahead: int) -> None:
        """It may be there or not; what is there is whole."""
        step, number, before = self.step + ahead, next(self.numbers), self._files()
        self.ops.replace_call(
            "replace", lambda real, *names: (real(*names), self.ops.fail("fsync_directory", errno.EIO))
        )
        with contextlib.suppress(StorageError):
            assert self.manager.save(step, tiny(number)).exception(0)
        self.ops.heal("replace")
        self.ops.heal("fsync_directory")
        with contextlib.suppress(StorageError):
            self.manager.wait()
        name = f"step-{step}/checkpoint_0.pt"
        assert {**self._files(), name: b""} == {**before, name: b""}
        assert_state(lastgood.load(self.root / name), number, ELEMENTS)
        self.good[step] = number
        self.ruined.discard(step)

    @rule(ahead=st.integers(1, 3), operation=st.sampled_from(["unlink", "remove_directory"]))
    def fail_to_remove(self, ahead: int, operation: str) -> None:
        """The next save makes up for it."""
        self.ops.fail(operation, errno.EIO)
        self._save(self.step + ahead, None, tidies=False)
        self.ops.heal(operation)

    @precondition(lambda self: self.good)
    @rule(data=st.data(), kind=st.sampled_from(["flip", "truncate", "empty"]))
    def ruin(self, data: Any, kind: str) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)), label="ruined")
        file = file_of(self.root, step)
        if kind == "flip":
            damage(file)
        else:
            file.write_bytes(file.read_bytes()[:1000] if kind == "truncate" else b"")
        del self.good[step]
        self.ruined.add(step)

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def rewind(self, data: Any) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)), label="rewound to")
        found, state = restore(self.manager, step)
        assert found == step
        assert_state(state, self.good[step], ELEMENTS)
        self.step = step

    @rule(rules=RULES)
    def restart(self, rules: list[RetentionRule]) -> None:
        """And resume, as every restarted training does."""
        self._open(rules)
        self._resume(self.manager)
        if self.good:
            self.step = max(self.good)
            self.ruined = {step for step in self.ruined if step < self.step}
        set_aside = {name: data for name, data in contents(self.root).items() if is_set_aside(name.split("/")[0])}
        self.left_alone = self.left_alone | set_aside

    # What always holds

    @invariant()
    def the_last_good_one_is_found(self) -> None:
        if not self.is_open:
            return
        copy = self.directory / "copy"
        shutil.copytree(self.root, copy)
        with manager_of(copy) as manager:
            self._resume(manager)
        shutil.rmtree(copy)

    def _resume(self, manager: CheckpointManager) -> None:
        if not self.good:
            if not self.ruined:
                assert restore(manager)[0] is None
                return
            with pytest.raises(CorruptCheckpointError, match="none of the checkpoints"):
                restore(manager)
            return
        found, state = restore(manager)
        newest = max(self.good)
        assert found == newest
        assert_state(state, self.good[newest], ELEMENTS)
        damaged = {passed.step for passed in manager.passed_over if passed.is_damaged}
        assert damaged == {step for step in self.ruined if step > newest}

    @invariant()
    def what_is_not_a_checkpoint_is_left_alone(self) -> None:
        if self.is_open:
            assert contents(self.root).items() >= self.left_alone.items()


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=25, stateful_step_count=14)
