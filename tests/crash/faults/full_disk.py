"""Runs on a disk that fills up: what runs in a process that has a small file system to itself."""

import errno
import os
from pathlib import Path
from typing import Any

from tests.helpers.disks import MIB, elements_of, mount_small_disk
from tests.helpers.saves import assert_state, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import directories

from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast

ELEMENTS = elements_of(3)
"""Of the state: 16 MiB have room for three of them, and for a fourth one once the first is gone."""


def fill(directory: str) -> Path:
    """Take all that is left, to the last byte."""
    filler = Path(directory, "filler")
    with filler.open("wb", buffering=0) as file:
        for size in (MIB, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    assert os.statvfs(directory).f_bavail == 0
    return filler


def resumed_by_another(root: str) -> tuple[int | None, int]:
    """The step that a new manager goes on from, and the number of the state that it loads."""
    state = state_of(99, ELEMENTS)
    with CheckpointManager(root, asynchronous=False, preemption_signals=()) as manager:
        step = manager.restore(state)
    assert_state(state, state["step"], ELEMENTS)
    return step, state["step"]


def run_on_full_disk(directory: str, asynchronous: bool) -> dict[str, Any]:
    """Two steps are there when the disk is filled by something else; two saves fail, then room is made."""
    skip = mount_small_disk(directory)
    if skip is not None:
        return {"skip": skip}
    root = f"{directory}/run"
    manager = CheckpointManager(root, asynchronous=asynchronous, keep=KeepLast(2), preemption_signals=())

    def save(step: int) -> BaseException | None:
        error = manager.save(step, state_of(step, ELEMENTS)).exception(PATIENCE_SECS)
        manager.wait()
        return error

    for step in (1, 2):
        assert save(step) is None
    filler = fill(directory)
    seen: dict[str, Any] = {"failures": [save(3), save(4)], "resumed while full": resumed_by_another(root)}
    seen["files while full"] = files_of(root)
    filler.unlink()
    seen["next"] = save(5)
    manager.close()
    seen["resumed in the end"] = resumed_by_another(root)
    seen["in the end"], seen["files in the end"] = directories(Path(root)), files_of(root)
    return seen


def files_of(root: str) -> list[str]:
    """Of checkpoints, temporaries and locks too; not the log."""
    return sorted(str(path.relative_to(root)) for path in Path(root).glob("*/*"))
