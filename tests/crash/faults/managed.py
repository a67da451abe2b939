"""What managers of runs do: save and remove what is old, prune, resume."""

import contextlib
from pathlib import Path

from tests.crash.faults.action import LEFT_BY_A_FAILURE, Action, Reported, leftovers, names
from tests.helpers.saves import assert_state, contents, read
from tests.manager.runs import ELEMENTS, assert_resumes, directories, make_run, manager_of, restore, tiny

from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.config import CheckpointerConfig
from lastgood.errors import LastgoodError
from lastgood.manager.catalog import RUN_LOG_NAME
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast
from lastgood.storage.file_ops import FileOps


class _Run(Action):
    """A manager with three steps behind it, which keeps the last two of all."""

    manager: CheckpointManager | None = None
    last = 4

    def prepare(self, root: Path) -> None:
        make_run(root, [1, 2, 3])

    def open_manager(self, root: Path, ops: FileOps) -> CheckpointManager:
        writer_config = CheckpointWriterConfig(no_progress_timeout_secs=self.timeout_secs)
        config = CheckpointerConfig(writer_config=writer_config)
        self.manager = manager_of(root, ops=ops, keep=KeepLast(2), config=config)
        return self.manager

    def assert_whole(self, root: Path, *steps: int) -> None:
        for step in steps:
            assert_state(read(root / f"step-{step}"), step, ELEMENTS)

    def go_on(self, root: Path) -> None:
        """Two saves: the second one finds everything in order, and removes what the first one could not yet."""
        assert self.manager is not None
        for _ in range(2):
            self.last += 1
            self.manager.save(self.last, tiny(self.last)).result(0)
            self.manager.wait()

    def assert_acknowledged(self, root: Path) -> None:
        assert assert_resumes(root, self.last) == ()

    def assert_tidy(self, root: Path) -> None:
        steps = [f"step-{step}" for step in (self.last - 1, self.last)]
        assert directories(root) == sorted(steps)
        for step in steps:
            assert names(root / step) == ["checkpoint_0.pt"]
        assert leftovers(root) == []

    def close(self) -> None:
        if self.manager is not None:
            manager, self.manager = self.manager, None
            # A failure that no later save has made good, which act() has raised already.
            with contextlib.suppress(LastgoodError):
                manager.close()


class SaveOfRun(_Run):
    """A save of a run, and the retention that follows it."""

    name = "save and retention of a run"
    indispensable = frozenset({"reserve", "fsync", "replace"})

    def act(self, root: Path, ops: FileOps) -> None:
        manager = self.open_manager(root, ops)
        failure = manager.save(4, tiny(4)).exception(0)
        manager.wait()
        if failure is not None:
            raise failure

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        with manager_of(root) as manager:
            step, state = restore(manager)
        assert step == 4 or (failure is not None and step == 3)
        assert_state(state, step, ELEMENTS)
        # Nothing is removed before what it makes room for is durable.
        self.assert_whole(root, 3, 4 if step == 4 else 2)
        assert len(leftovers(root)) <= LEFT_BY_A_FAILURE


class Prune(_Run):
    """``CheckpointManager.prune``, with what an unfinished save has left among what it is to clear away."""

    name = "prune"
    indispensable = frozenset({"remove_directory"})

    def prepare(self, root: Path) -> None:
        make_run(root, [1, 2, 4])
        (root / "step-3").mkdir()

    def act(self, root: Path, ops: FileOps) -> None:
        manager = self.open_manager(root, ops)
        report = manager.prune()
        manager.wait()
        removed = {verdict.entry.step for verdict in report.removed} | {entry.step for entry in report.leftovers}
        assert not any((root / f"step-{step}" / "checkpoint_0.pt").exists() for step in removed)
        # One that cannot be read any more is not known to be the one that was to be removed: it is left alone, too.
        reasons = [reason for _, reason in report.skipped if "somebody is writing it" not in reason]
        if reasons:
            raise Reported("; ".join(reasons), path=str(root))

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        self.assert_whole(root, 2, 4)
        assert assert_resumes(root, 4) == ()


class Resume(_Run):
    """``CheckpointManager.restore``: the newest checkpoint, or an earlier one if that cannot be read at this time."""

    name = "resume"
    indispensable = frozenset()

    def act(self, root: Path, ops: FileOps) -> None:
        self.before = _without_log(root)
        manager = self.open_manager(root, ops)
        step, state = restore(manager)
        assert step in (1, 2, 3)
        assert_state(state, step, ELEMENTS)
        manager.wait()
        if step != 3:
            raise Reported("; ".join(passed.problem for passed in manager.passed_over), path=str(root))

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        # What cannot be read for a moment is not damaged, and not set aside.
        assert _without_log(root) == self.before
        assert assert_resumes(root, 3) == ()


def _without_log(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name != RUN_LOG_NAME}
