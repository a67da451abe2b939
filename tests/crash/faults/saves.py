"""Saves of one rank, of one of two, and of a single file."""

import abc
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from tests.crash.faults.action import DURABLE_WRITE, LEFT_BY_A_FAILURE, READ, Action, leftovers, names
from tests.crash.stopping import leave_rank_1s_file
from tests.helpers.saves import NotingBarrier, assert_state, commit_together, read, save, state_of
from tests.unit.coordination.ranks_here import Ranks

import lastgood
from lastgood import _single_file
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import CheckpointExistsError, CheckpointNotFoundError, LastgoodError, UncommittedCheckpointError
from lastgood.format.epoch import EPOCH_NAME
from lastgood.storage._durable_write import is_temporary
from lastgood.storage._file_lock import is_lock
from lastgood.storage.base import StorageBackend
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


REFUSED = 99
"""The number of a state that is never saved."""


class _SaveOfTwo(Action):
    """Two ranks save step 2 under a manifest. The step before is committed."""

    indispensable = DURABLE_WRITE | READ | {"link"}
    apart: ClassVar[int]
    """By how much the numbers of the ranks' states differ."""

    left_by_a_failure = LEFT_BY_A_FAILURE
    may_leave_locks = False
    """Such that nobody holds, and no later save comes to."""

    step, number = 2, 20

    def prepare(self, root: Path) -> None:
        assert commit_together(root / "step-1", 10) == [None, None]

    @abc.abstractmethod
    def save(self, path: Path, number: int) -> None:
        """All ranks save; raises what lastgood raises."""

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        for rank in range(2):
            assert_state(read(root / "step-1", rank, 2), 10 + rank)
        assert self._is_committed(root) or failure is not None
        assert len(leftovers(root)) <= self.left_by_a_failure

    def _is_committed(self, root: Path) -> bool:
        """Whether the two files of the step are a checkpoint; what they hold is right then."""
        found = []
        for rank in range(2):
            with contextlib.suppress(UncommittedCheckpointError, CheckpointNotFoundError):
                assert_state(read(root / f"step-{self.step}", rank, 2), self.number + rank * self.apart)
                found.append(rank)
        assert found in ([], [0, 1])
        return bool(found)

    def go_on(self, root: Path) -> None:
        """Save to the same path, if the commit has failed, and to the next one if it has not."""
        if self._is_committed(root):
            with contextlib.suppress(CheckpointExistsError):
                self.save(root / f"step-{self.step}", REFUSED)
                raise AssertionError("a committed checkpoint of two ranks was replaced")
            assert self._is_committed(root)
            self.step += 1
        self.number += 10
        self.save(root / f"step-{self.step}", self.number)

    def assert_acknowledged(self, root: Path) -> None:
        assert self._is_committed(root)

    def assert_tidy(self, root: Path) -> None:
        for step in range(1, self.step + 1):
            directory = root / f"step-{step}"
            # A manifest may keep the name under which it was written, beside its own, for as long as it is there, and
            # so may a lock: no save comes to a committed checkpoint any more that could clear them away, and they take
            # no space.
            found = [name for name in self._names(directory) if not self._is_manifest_too(directory, name)]
            assert not LocalStorage().has_writers(str(directory))
            assert found == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
        steps = [f"step-{step}" for step in range(1, self.step + 1)]
        assert [name for name in self._names(root) if name != EPOCH_NAME] == steps

    def _names(self, directory: Path) -> list[str]:
        """All but the locks that may stay."""
        return [name for name in names(directory) if not (self.may_leave_locks and is_lock(name))]

    def _is_manifest_too(self, directory: Path, name: str) -> bool:
        return is_temporary(name) and (directory / name).samefile(directory / "manifest.json")


class SaveWithManifest(_SaveOfTwo):
    """Rank 0 saves and commits; rank 1 has published its file already."""

    name = "save of rank 0 of two"
    apart = 0

    def prepare(self, root: Path) -> None:
        super().prepare(root)
        leave_rank_1s_file(str(root / "step-2"), 20)

    def act(self, root: Path, ops: FileOps) -> None:
        config = CheckpointWriterConfig(no_progress_timeout_secs=self.timeout_secs)
        self.writer = CheckpointWriter(config, RankInfo(0, 2), NotingBarrier(), storage=LocalStorage(ops))
        self.writer.write(str(root / "step-2"), state_of(20))

    def save(self, path: Path, number: int) -> None:
        if number != REFUSED:
            leave_rank_1s_file(str(path), number)
        self.writer.write(str(path), state_of(number))


class _SaveByVotes(_SaveOfTwo):
    """Both ranks save at once, and vote; the files of one of them are spoilt."""

    spoilt: ClassVar[int]
    apart = 1
    left_by_a_failure = LEFT_BY_A_FAILURE + 1  # the lock of the epoch
    may_leave_locks = True

    def act(self, root: Path, ops: FileOps) -> None:
        secs = self.timeout_secs
        storages: dict[int, StorageBackend] = {self.spoilt: LocalStorage(ops)}
        self.ranks = Ranks(2, timeout_secs=secs, no_progress_timeout_secs=secs, storages=storages)
        self.save(root / "step-2", 20)

    def save(self, path: Path, number: int) -> None:
        errors = self.ranks.save(path, number)
        if errors[self.spoilt] is None:
            assert errors == [None, None]
            return
        # Rank 1 may have seen the manifest, and made its name certain, where rank 0 was given up at that.
        assert errors[1 - self.spoilt] is not None or (path / "manifest.json").exists(), "the other rank was not told"
        raise errors[self.spoilt]

    def close(self) -> None:
        self.ranks.close()


class SaveOfVotingRank0(_SaveByVotes):
    name = "save of rank 0 of two that vote"
    spoilt = 0


class SaveOfVotingRank1(_SaveByVotes):
    name = "save of rank 1 of two that vote"
    indispensable = DURABLE_WRITE
    spoilt = 1
