"""A training that comes back after the power was cut: it resumes, verifies, saves, prunes; and what it must find."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from tests.crash.power_cuts.promises import DURABLE, SAVING, Promises, promises_of
from tests.manager.runs import manager_of, restore, tiny

import lastgood._threads
import lastgood.manager.housekeeping
import lastgood.storage._in_time
from lastgood._contents import verify_checkpoint
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import CheckpointNotFoundError
from lastgood.manager.catalog import Catalog, Condition, is_set_aside, read_catalog
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast, RetentionRule
from lastgood.storage._durable_write import is_temporary
from lastgood.storage._file_lock import is_lock
from lastgood.storage.local import LocalStorage
from lastgood.testing import CrashFileOps
from lastgood.types import RankInfo

ROOT = "/data/runs/run"
NEXT = 900_001
"""The number of the state that is saved after the power was cut."""

_POWER_IS_CUT_AGAIN = 3
"""Of so many recoveries, one is cut off itself."""


@contextmanager
def without_threads() -> Iterator[None]:
    """Everything is done at once, by the thread that asks for it, as when the interpreter is ending.

    Time limits and work in the background have no part in what is found on a disk, and cost most of the time.
    """

    def none(work: object, *, name: str) -> None:
        return None

    def at_once(function: Callable[[], Any], *clock: object, name: str) -> Any:
        return function()

    with (
        patch.object(lastgood._threads, "start_daemon", none),
        patch.object(lastgood.manager.housekeeping, "start_daemon", none),
        patch.object(lastgood.storage._in_time, "call_with_timeout", at_once),
    ):
        yield


@lru_cache(maxsize=256)
def expected(number: int) -> dict[str, Any]:
    """What was saved under this number; not to be changed."""
    return tiny(number)


def number_of(state: dict[str, Any]) -> int:
    """Which state it is: bit for bit, or this fails."""
    number = state["step"]
    for name, tensor in expected(number)["model"].items():
        assert torch.equal(state["model"][name], tensor), f"{name} of the state {number} is not what was saved"
    return int(number)


def rules(keep: int | None) -> list[RetentionRule]:
    return [] if keep is None else [KeepLast(keep)]


def manager_on(ops: Any, keep: int | None = None) -> CheckpointManager:
    return manager_of(ROOT, ops=ops, keep=rules(keep))


def read_at(ops: CrashFileOps, path: str, rank: int = 0, world_size: int = 1) -> int:
    """The number of the checkpoint at a path, of which every byte is what was written."""
    reader = CheckpointReader(RankInfo(rank, world_size), storage=LocalStorage(ops))
    state, missing = reader.read(path, verify_whole=True)
    assert missing == []
    return number_of(state)


def debris(ops: CrashFileOps, directory: str) -> list[str]:
    """Temporaries and locks directly in a directory."""
    return [name for name in ops.list_directory(directory) if is_temporary(name) or is_lock(name)]


def recover_run(ops: CrashFileOps, notes: list[tuple[Any, ...]]) -> None:
    """Go on from what a power cut has left, as a training does; raises where a promise was broken."""
    promises = Promises(notes)
    with without_threads():
        before = _check_catalog(ops, promises)
        with manager_on(ops, promises.keep) as manager:
            newest = _check_resumed(manager, LocalStorage(ops), promises, before)
            step = _next_step(promises, newest)
            manager.save(step, tiny(NEXT)).result(0)
            saved_at = ops.operation_count
            manager.wait()
            manager.prune()
        _check_afterwards(ops, promises, set(before) | {step}, step)
        wanted = max({**before, step: NEXT}.items())
        with manager_on(ops) as manager:
            resumed, state = restore(manager)
            assert (resumed, number_of(state)) == wanted
        _cut_again(ops, before, promises.keep, step, saved_at)


def _check_catalog(ops: CrashFileOps, promises: Promises) -> dict[int, int]:
    """What is there by step, each whole and one of those that may be; those that must be are."""
    storage = LocalStorage(ops)
    catalog = read_catalog(storage, ROOT)
    check_conditions(catalog, promises)
    there = {entry.step: read_at(ops, entry.path) for entry in catalog.committed}
    for step, number in there.items():
        allowed = promises.numbers.get(step, {None})
        assert number in allowed, f"the checkpoint of step {step} is state {number}, not one of {allowed}"
    required = promises.required(there)
    assert required <= set(there), f"the checkpoints of {required - set(there)} are gone; there are {sorted(there)}"
    _check_set_aside(ops, promises, catalog)
    return there


def check_conditions(catalog: Catalog, promises: Promises) -> None:
    """Everything is a checkpoint, or visibly none; and what has been removed is gone for good."""
    for entry in catalog.entries:
        assert entry.condition in (Condition.COMMITTED, Condition.UNFINISHED), entry
        assert entry.step not in promises.removed, f"step {entry.step} was removed, and is here again"


def _check_set_aside(ops: CrashFileOps, promises: Promises, catalog: Catalog) -> None:
    found: dict[int, set[int]] = {}
    for name in catalog.others:
        if is_set_aside(name):
            step = int(name.removeprefix("step-").partition(".")[0])
            with contextlib.suppress(CheckpointNotFoundError):
                found.setdefault(step, set()).add(read_at(ops, os.path.join(ROOT, name)))
        else:
            assert name == "lastgood.jsonl", f"what is {name}?"
    for step, numbers in promises.set_aside:
        assert None in numbers or numbers & found.get(step, set()), f"what was set aside of step {step} is gone"


def _check_resumed(
    manager: CheckpointManager, storage: LocalStorage, promises: Promises, there: dict[int, int]
) -> int | None:
    step, state = restore(manager)
    assert not [passed for passed in manager.passed_over if passed.is_damaged], manager.passed_over
    assert step == max(there, default=None)
    if step is not None:
        assert number_of(state) == there[step]
        report = verify_checkpoint(os.path.join(ROOT, f"step-{step}"), storage)
        assert not report.problems, report.problems
    newer = {other for other in promises.certain if step is None or other > step}
    assert not newer, f"resumed from {step}, but {newer} were acknowledged"
    return step


def _next_step(promises: Promises, newest: int | None) -> int:
    """A training that was saving comes to the same step again."""
    return promises.under_way if promises.under_way is not None else (newest or 0) + 1


def _check_afterwards(ops: CrashFileOps, promises: Promises, there: set[int], saved: int) -> None:
    catalog = read_catalog(LocalStorage(ops), ROOT)
    left = {entry.step for entry in catalog.committed}
    assert left == promises.newest(there) | {saved}
    for directory in (ROOT, os.path.join(ROOT, f"step-{saved}")):
        assert not debris(ops, directory), f"{directory}: {debris(ops, directory)}"
    unfinished = {entry.step for entry in catalog.entries if not entry.is_committed}
    assert not {step for step in unfinished if step < max(left)}, f"{unfinished} were not cleared away"
    assert ops.list_directory(os.path.join(ROOT, f"step-{saved}")) == ["checkpoint_0.pt"]


def _cut_again(ops: CrashFileOps, before: dict[int, int], keep: int | None, step: int, saved_at: int) -> None:
    """The recovery is cut off, too: what was there before it is not lost to it, and what it was promised stays."""
    rng = random.Random(ops.digest())
    if rng.randrange(_POWER_IS_CUT_AGAIN):
        return
    moment = rng.randrange(ops.operation_count + 1)
    promises = promises_of(before, keep=keep)
    promises.note(SAVING, step, NEXT)
    if moment >= saved_at:
        promises.note(DURABLE, step, NEXT)
    state = ops.random_state(moment, rng)
    there = _check_catalog(state, promises)
    with manager_on(state) as manager:
        _check_resumed(manager, LocalStorage(state), promises, there)
