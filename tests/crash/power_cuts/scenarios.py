"""What is done until the power is cut: small runs with one rank, whose states can all be gone through."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from unittest.mock import patch

import torch
from tests.crash.power_cuts.cutting import Notes, Scenario
from tests.crash.power_cuts.promises import (
    DURABLE,
    KEEPING,
    PRUNED,
    PRUNING,
    SAVING,
    SET_ASIDE,
    SETTING_ASIDE,
    Promises,
)
from tests.crash.power_cuts.runs_recovered import (
    NEXT,
    debris,
    manager_on,
    number_of,
    read_at,
    recover_run,
    without_threads,
)
from tests.manager.runs import tiny

import lastgood
from lastgood import _single_file
from lastgood._contents import verify_checkpoint
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import CheckpointNotFoundError
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.storage.local import LocalStorage
from lastgood.testing import CrashFileOps
from lastgood.types import RankInfo

# Runs of a manager


def save(ops: CrashFileOps, manager: CheckpointManager, step: int, number: int) -> None:
    ops.note(SAVING, step, number)
    manager.save(step, tiny(number), {"loss": 1 / number}).result(0)
    # For what is done in the background, too: so the same is done in the same order every time.
    manager.wait()
    ops.note(DURABLE, step, number)


def run_of(*steps: int, keep: int | None = None) -> Callable[[CrashFileOps], None]:
    """Saves of these steps, each of another state."""

    def record(ops: CrashFileOps) -> None:
        ops.note(KEEPING, keep)
        with manager_on(ops, keep) as manager:
            for number, step in enumerate(steps, 1):
                save(ops, manager, step, number)

    return record


def prune_at_once(ops: CrashFileOps) -> None:
    run_of(1, 2)(ops)
    with manager_on(ops, 1) as manager:
        ops.note(PRUNING, 1)
        manager.prune()
        manager.wait()
        ops.note(PRUNED)


def set_aside_and_go_on(ops: CrashFileOps) -> None:
    ops.note(KEEPING, 2)
    with manager_on(ops, 2) as manager:
        for step in (1, 2):
            save(ops, manager, step, step)
        set_aside(ops, manager, 2)
        save(ops, manager, 2, 3)
        set_aside(ops, manager, 2)
        save(ops, manager, 2, 4)


def set_aside(ops: CrashFileOps, manager: CheckpointManager, step: int) -> None:
    ops.note(SETTING_ASIDE, step)
    manager.set_aside(step)
    manager.wait()
    ops.note(SET_ASIDE, step)


# One checkpoint at one path, and one file

PATH = "/data/checkpoint"
FILE = "/data/states/state.pt"
STEP = 1


def overwrite_checkpoint(ops: CrashFileOps) -> None:
    """The first save ever is among them."""
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), storage=LocalStorage(ops))
    for number in (1, 2):
        ops.note(SAVING, STEP, number)
        writer.write(PATH, tiny(number))
        ops.note(DURABLE, STEP, number)
    writer.close()


def recover_checkpoint(ops: CrashFileOps, notes: Notes) -> None:
    with without_threads():
        try:
            found: int | None = read_at(ops, PATH)
        except CheckpointNotFoundError:
            found = None
        allowed = Promises(notes).numbers.get(STEP, {None})
        assert found in allowed, f"found the state {found}, not one of {allowed}"
        writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), storage=LocalStorage(ops))
        writer.write(PATH, tiny(NEXT))
        assert read_at(ops, PATH) == NEXT
        assert ops.list_directory(PATH) == ["checkpoint_0.pt"]


@contextmanager
def single_files_on(ops: CrashFileOps) -> Iterator[None]:
    """``lastgood.save`` and ``lastgood.load`` take no storage: they use this one."""
    with patch.object(_single_file, "LocalStorage", lambda: LocalStorage(ops)):
        yield


def overwrite_file(ops: CrashFileOps) -> None:
    with single_files_on(ops):
        for number in (1, 2):
            ops.note(SAVING, STEP, number)
            lastgood.save(tiny(number), FILE)
            ops.note(DURABLE, STEP, number)


def recover_file(ops: CrashFileOps, notes: Notes) -> None:
    with without_threads(), single_files_on(ops):
        found: int | None = None
        with contextlib.suppress(CheckpointNotFoundError):
            found = number_of(lastgood.load(FILE))
        allowed = Promises(notes).numbers.get(STEP, {None})
        assert found in allowed, f"found the state {found}, not one of {allowed}"
        if found is not None:
            assert not verify_checkpoint(FILE, LocalStorage(ops)).problems
            # What torch itself makes of it.
            assert number_of(torch.load(BytesIO(ops.contents()[FILE]), weights_only=True)) == found
        lastgood.save(tiny(NEXT), FILE)
        assert number_of(lastgood.load(FILE)) == NEXT
        assert not debris(ops, os.path.dirname(FILE))


def _of_a_run(name: str, record: Callable[[CrashFileOps], None]) -> Scenario:
    return Scenario(name, record, recover_run)


SMALL: list[Scenario] = [
    _of_a_run("the first save ever", run_of(1)),
    _of_a_run("the last one is kept", run_of(1, 2, keep=1)),
    Scenario("a checkpoint is overwritten", overwrite_checkpoint, recover_checkpoint),
    Scenario("a file is overwritten", overwrite_file, recover_file),
]
"""Every run of the tests goes through all their states."""

LARGER: list[Scenario] = [
    _of_a_run("the last two are kept and a step is saved anew", run_of(1, 2, 2, 3, keep=2)),
    _of_a_run("all are pruned but one", prune_at_once),
    _of_a_run("steps are set aside and saved again", set_aside_and_go_on),
    _of_a_run("the last two of many are kept", run_of(*range(1, 7), keep=2)),
]
"""Of these, through all of them only where there is time."""
