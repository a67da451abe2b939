"""Loads of all kinds, and ``verify``: nothing on disk changes, whatever happens."""

from pathlib import Path
from typing import Any

import torch
from tests.crash.faults.action import READ, Action, Reported, leftovers
from tests.crash.faults.saves import single_file_storage
from tests.helpers.saves import assert_state, commit_together, read, state_of

import lastgood
from lastgood._contents import verify_checkpoint
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import LastgoodError
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.file_ops import FileOps
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

ELEMENTS = 150_000
"""A file of so many floats is read past the page cache where it is not in it."""


class _Load(Action):
    """Of what one rank has saved at ``root/checkpoint``."""

    only_reads = True
    indispensable = READ

    def prepare(self, root: Path) -> None:
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1)).write(
            str(root / "checkpoint"), state_of(1, ELEMENTS)
        )

    def reader(self, ops: FileOps, rank: int = 0, world_size: int = 1) -> CheckpointReader:
        return CheckpointReader(RankInfo(rank, world_size), storage=LocalStorage(ops))

    def look(self, root: Path, failure: LastgoodError | None) -> None:
        self.assert_acknowledged(root)
        self.assert_tidy(root)

    def go_on(self, root: Path) -> None:
        """Nothing: what there is to see has been seen by :meth:`look`."""

    def assert_acknowledged(self, root: Path) -> None:
        assert_state(read(root / "checkpoint"), 1, ELEMENTS)

    def assert_tidy(self, root: Path) -> None:
        assert leftovers(root) == []


class LoadNew(_Load):
    name = "load"

    def act(self, root: Path, ops: FileOps) -> None:
        found, missing = self.reader(ops).read(str(root / "checkpoint"))
        assert missing == []
        assert_state(found, 1, ELEMENTS)


class LoadInPlace(_Load):
    name = "load in place"

    def act(self, root: Path, ops: FileOps) -> None:
        target = state_of(9, ELEMENTS)
        tensors = dict(target["model"])
        found, missing = self.reader(ops).read(str(root / "checkpoint"), target, verify_whole=True)
        assert missing == []
        assert_state(found, 1, ELEMENTS)
        assert all(found["model"][name] is tensor for name, tensor in tensors.items())


class LoadPart(_Load):
    name = "load of a part"

    def act(self, root: Path, ops: FileOps) -> None:
        target: dict[str, Any] = {"model": {"bias": torch.zeros(10)}, "step": None}
        found, missing = self.reader(ops).read(str(root / "checkpoint"), target)
        assert missing == []
        assert found["step"] == 1
        assert torch.equal(found["model"]["bias"], state_of(1, ELEMENTS)["model"]["bias"])


class LoadFile(_Load):
    name = "lastgood.load"

    def prepare(self, root: Path) -> None:
        lastgood.save(state_of(1, ELEMENTS), root / "state.pt")

    def act(self, root: Path, ops: FileOps) -> None:
        with single_file_storage(ops):
            assert_state(lastgood.load(root / "state.pt", verify_first=True), 1, ELEMENTS)

    def assert_acknowledged(self, root: Path) -> None:
        assert_state(lastgood.load(root / "state.pt"), 1, ELEMENTS)


class LoadOfTwoRanks(_Load):
    name = "load of rank 1 of two"

    def prepare(self, root: Path) -> None:
        assert commit_together(root / "checkpoint", 10) == [None, None]

    def act(self, root: Path, ops: FileOps) -> None:
        found, missing = self.reader(ops, 1, 2).read(str(root / "checkpoint"))
        assert missing == []
        assert_state(found, 11)

    def assert_acknowledged(self, root: Path) -> None:
        for rank in range(2):
            assert_state(read(root / "checkpoint", rank, 2), 10 + rank)


class Verify(_Load):
    """What cannot be read is a problem of the file: it is not known to be good."""

    name = "verify"

    def act(self, root: Path, ops: FileOps) -> None:
        storage = StorageInTime(LocalStorage(ops), self.timeout_secs)
        report = verify_checkpoint(str(root / "checkpoint"), storage)
        if report.problems:
            raise Reported(report.problems[0].message, path=report.problems[0].file)
        assert report.files == 1
