"""Saves of one rank, of one of two, and of a single file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from tests.crash.faults.action import DURABLE_WRITE, LEFT_BY_A_FAILURE, READ, Action, leftovers, names
from tests.crash.stopping import leave_rank_1s_file
from tests.helpers.saves import NotingBarrier, assert_state, commit_together, read, save, state_of

import lastgood
from lastgood import _single_file
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import CheckpointExistsError, CheckpointNotFoundError, LastgoodError, UncommittedCheckpointError
from lastgood.storage._durable_write import is_temporary
from lastgood.storage.file_ops import FileOps
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo


class _Save(Action):
    """One rank saves to ``root/checkpoint``, beside another checkpoint."""

    overwrites: ClassVar[bool]
    indispensable = DURABLE_WRITE
    last = 2

    def prepare(self, root: Path) -> None:
        save(root / "other", 7)
        if self.overwrites:
            save(root / "checkpoint", 1)

    def act(self, root: Path, ops: FileOps) -> None:
        config = CheckpointWriterConfig(no_progress_timeout_secs=self.timeout_secs)
        self.writer = CheckpointWriter(config, RankInfo(0, 1), storage=LocalStorage(ops))
        self.writer.write(str(root / "checkpoint"), state_of(2))

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        assert_state(read(root / "other"), 7)
        assert len(leftovers(root)) <= LEFT_BY_A_FAILURE
        try:
            found = read(root / "checkpoint")
        except CheckpointNotFoundError:
            assert failure is not None
            assert not self.overwrites
            return
        assert_state(found, found["step"])
        assert found["step"] == 2 or (failure is not None and self.overwrites)

    def go_on(self, root: Path) -> None:
        self.last += 1
        self.writer.write(str(root / "checkpoint"), state_of(self.last))

    def assert_acknowledged(self, root: Path) -> None:
        assert_state(read(root / "checkpoint"), self.last)

    def assert_tidy(self, root: Path) -> None:
        assert names(root / "checkpoint") == ["checkpoint_0.pt"]
        assert names(root) == ["checkpoint", "other"]


class FirstSave(_Save):
    """There is no directory of the checkpoint yet, nor one above it."""

    name = "first save"
    overwrites = False


class Overwrite(_Save):
    name = "save over a checkpoint"
    overwrites = True


class SaveFile(Action):
    """``lastgood.save`` over a file."""

    name = "lastgood.save"
    indispensable = DURABLE_WRITE
    last = 2

    def prepare(self, root: Path) -> None:
        lastgood.save(state_of(1), root / "state.pt")

    def act(self, root: Path, ops: FileOps) -> None:
        with single_file_storage(ops):
            lastgood.save(state_of(2), root / "state.pt")

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        for load in (lastgood.load, torch.load):
            found = load(root / "state.pt")
            assert_state(found, found["step"])
            assert found["step"] == 2 or failure is not None
        assert len(leftovers(root)) <= LEFT_BY_A_FAILURE

    def go_on(self, root: Path) -> None:
        self.last += 1
        lastgood.save(state_of(self.last), root / "state.pt")

    def assert_acknowledged(self, root: Path) -> None:
        assert_state(lastgood.load(root / "state.pt"), self.last)

    def assert_tidy(self, root: Path) -> None:
        assert names(root) == ["state.pt"]


@contextlib.contextmanager
def single_file_storage(ops: FileOps) -> Iterator[None]:
    """``lastgood.save`` and ``lastgood.load``, to which no storage can be passed, go through these operations."""
    _single_file.LocalStorage = lambda: LocalStorage(ops)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        _single_file.LocalStorage = LocalStorage  # type: ignore[misc]


class SaveWithManifest(Action):
    """Rank 0 of two saves and commits; rank 1 has published its file already. The step before is committed."""

    name = "save of rank 0 of two"
    indispensable = DURABLE_WRITE | READ | {"link"}
    step, number = 2, 20

    def prepare(self, root: Path) -> None:
        assert commit_together(root / "step-1", 10) == [None, None]
        leave_rank_1s_file(str(root / "step-2"), 20)

    def act(self, root: Path, ops: FileOps) -> None:
        config = CheckpointWriterConfig(no_progress_timeout_secs=self.timeout_secs)
        self.writer = CheckpointWriter(config, RankInfo(0, 2), NotingBarrier(), storage=LocalStorage(ops))
        self.writer.write(str(root / "step-2"), state_of(20))

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        for rank in range(2):
            assert_state(read(root / "step-1", rank, 2), 10 + rank)
        assert self._is_committed(root) or failure is not None
        assert len(leftovers(root)) <= LEFT_BY_A_FAILURE

    def _is_committed(self, root: Path) -> bool:
        """Whether the two files of the step are a checkpoint; what they hold is right then."""
        found = []
        for rank in range(2):
            with contextlib.suppress(UncommittedCheckpointError, CheckpointNotFoundError):
                assert_state(read(root / f"step-{self.step}", rank, 2), self.number)
                found.append(rank)
        assert found in ([], [0, 1])
        return bool(found)

    def go_on(self, root: Path) -> None:
        """Save to the same path, if the commit has failed, and to the next one if it has not."""
        if self._is_committed(root):
            with contextlib.suppress(CheckpointExistsError):
                self.writer.write(str(root / f"step-{self.step}"), state_of(99))
                raise AssertionError("a committed checkpoint of two ranks was replaced")
            assert self._is_committed(root)
            self.step += 1
        self.number += 10
        leave_rank_1s_file(str(root / f"step-{self.step}"), self.number)
        self.writer.write(str(root / f"step-{self.step}"), state_of(self.number))

    def assert_acknowledged(self, root: Path) -> None:
        assert self._is_committed(root)

    def assert_tidy(self, root: Path) -> None:
        for step in range(1, self.step + 1):
            directory = root / f"step-{step}"
            # A manifest may keep the name under which it was written, beside its own, for as long as it is there: no
            # save comes to a committed checkpoint any more that could clear it away, and it takes no space.
            found = [name for name in names(directory) if not self._is_manifest_too(directory, name)]
            assert found == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
        assert len(names(root)) == self.step

    def _is_manifest_too(self, directory: Path, name: str) -> bool:
        return is_temporary(name) and (directory / name).samefile(directory / "manifest.json")
