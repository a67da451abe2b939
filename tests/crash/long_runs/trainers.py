"""What runs in processes of its own: a training that saves for a long time, and a reader that looks on."""

import os
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.crash.kills.training import Training, assert_whole
from tests.helpers.saves import read
from tests.survival.test_flatness import costs_of
from tests.survival.trainers import process_of

import lastgood
from lastgood._contents import verify_checkpoint
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import CheckpointNotFoundError
from lastgood.manager.catalog import Condition, read_catalog, step_name
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepBest, KeepLast
from lastgood.storage.local import LocalStorage

KEEP = (KeepLast(3), KeepBest(2, "loss"))
MOST_KEPT = 5

_USUAL = {"weights": 1 << 16, "others": 1 << 14, "bias": 100}
"""320 KiB, of which the larger two tensors are copied in the background."""

_ODD = {**_USUAL, "weights": 1 << 17, "extra": 1000}
_ODD_ONE_IN = 25
"""Now and then a state has other shapes, and more in it."""


def sizes_of(step: int) -> dict[str, int]:
    """The tensors of a state, by their numbers of elements."""
    return _ODD if step % _ODD_ONE_IN == 0 else _USUAL


def save_many_times(pipe: Connection, root: str, asynchronous: bool, steps: int, every: int) -> None:
    """Save as fast as it goes; send what all of it takes after each so many saves, with nothing under way."""
    trainings = [Training(0, sizes) for sizes in (_USUAL, _ODD)]
    with CheckpointManager(root, asynchronous=asynchronous, keep=KEEP, preemption_signals=()) as manager:
        for step in range(1, steps + 1):
            training = trainings[step % _ODD_ONE_IN == 0]
            with manager.hold():
                training.go_to(step)
            manager.save(step, training.state(), {"loss": step * 7919 % 1009})
            if step % every == 0:
                manager.wait()
                pipe.send(("costs", _costs(manager, root)))


def _costs(manager: CheckpointManager, root: str) -> dict[str, int]:
    costs = {f"{what} of the trainer": count for what, count in _costs_of_process(os.getpid()).items()}
    if isinstance(manager._checkpointer, AsyncCheckpointer):
        process = process_of(manager._checkpointer)
        costs |= {f"{what} of the process": count for what, count in _costs_of_process(process).items()}
    directories = [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]
    costs["directory entries"] = sum(len(os.listdir(directory)) for directory in directories)
    return costs


def _costs_of_process(pid: int) -> dict[str, int]:
    opened = [os.readlink(file.path) for file in os.scandir(f"/proc/{pid}/fd") if os.path.lexists(file.path)]
    mapped = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {**costs_of(pid), "files in /dev/shm": sum("/dev/shm/" in name for name in [*opened, *mapped])}


# The reader


def read_until_told(pipe: Connection, root: str) -> Counter[str]:
    """Restore and verify the newest checkpoint, in one way after the other; how often, by what was done.

    One that is removed meanwhile is none to read: then there is a newer one. Nothing else may go wrong.
    """
    done: Counter[str] = Counter()
    newest = 0
    while not pipe.poll(0):
        step = _newest(root)
        assert step >= newest, f"step {step} is the newest now, and step {newest} was before"
        done["steps seen"] += step > newest
        newest = step
        name = [*_WAYS][done.total() % len(_WAYS)]
        if not newest:
            continue
        try:
            state = _WAYS[name](Path(root, step_name(newest)))
        except (CheckpointNotFoundError, FileNotFoundError):
            assert _newest(root) > newest, f"step {newest} is the newest, and cannot be read"
            done["gone meanwhile"] += 1
            continue
        if state is not None:
            assert assert_whole(state, sizes_of(newest)) == newest
        done[name] += 1
    pipe.recv()
    return done


def _newest(root: str) -> int:
    entries = read_catalog(LocalStorage(), root).entries
    assert {entry.condition for entry in entries} <= {Condition.COMMITTED, Condition.UNFINISHED}, entries
    return max((entry.step for entry in entries if entry.is_committed), default=0)


def _verify(path: Path) -> None:
    report = verify_checkpoint(str(path))
    assert not report.problems, report.problems


_WAYS: dict[str, Callable[[Path], Any]] = {
    "restored": read,
    "verified": _verify,
    "loaded": lambda path: lastgood.load(path / "checkpoint_0.pt"),
    "loaded by torch": lambda path: torch.load(path / "checkpoint_0.pt", weights_only=True),
}
