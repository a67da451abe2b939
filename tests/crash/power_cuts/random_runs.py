"""Runs that do this and that: save, fail to save, save anew, set aside, prune, are restarted, and are killed."""

import contextlib
import errno
import logging
import math
import random
from functools import partial
from typing import Any

import torch
from tests.crash.power_cuts.cutting import Cutter, Scenario, Tally
from tests.crash.power_cuts.promises import DURABLE, FAILED, KEEPING, KILLED, PRUNED, PRUNING, SAVING
from tests.crash.power_cuts.runs_recovered import manager_on, recover_run, without_threads
from tests.crash.power_cuts.scenarios import save, set_aside
from tests.manager.runs import restore, tiny

from lastgood.errors import StorageError
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.testing import CrashFileOps

_NAME = "random run "
_KILLED = "killed at "
OPERATIONS_OF_A_SAVE = 70
"""At least so many."""


class KilledError(BaseException):
    """The process is dead: nothing of it does anything any more."""


class DyingFileOps:
    """The operations of a process that is killed after ``last`` of them, or after the first one named ``after``."""

    def __init__(self, ops: CrashFileOps, last: float = math.inf, *, after: str = "") -> None:
        self._ops = ops
        self._left = last
        self._after = after

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def done_if_alive(*arguments: Any) -> Any:
            if self._left <= 0:
                raise KilledError
            self._left = 0 if name == self._after else self._left - 1
            return operation(*arguments)

        return done_if_alive


def save_and_die(ops: CrashFileOps, dying: DyingFileOps, keep: int | None, step: int, number: int) -> None:
    """A process that comes back, saves ``step``, and is killed on the way, unless it is done before that."""
    with contextlib.suppress(KilledError), without_threads():
        manager = manager_on(dying, keep)
        ops.note(SAVING, step, number)
        manager.save(step, tiny(number))
        ops.note(DURABLE, step, number)
    ops.note(KILLED)
    ops.end_processes()


def killed(operation: str) -> Scenario:
    """The first save ever is killed; another process saves the same step, and the next one.

    ``operation``: the number of the first one that is not done, or the name of the last one that is.
    """

    def record(ops: CrashFileOps) -> None:
        dying = DyingFileOps(ops, int(operation)) if operation.isdigit() else DyingFileOps(ops, after=operation)
        save_and_die(ops, dying, None, 1, 1)
        with manager_on(ops) as manager:
            for step, number in ((1, 2), (2, 3)):
                save(ops, manager, step, number)

    return Scenario(f"{_KILLED}{operation}", record, recover_run)


class _Run:
    def __init__(self, ops: CrashFileOps, rng: random.Random) -> None:
        self.ops = ops
        self.rng = rng
        self.keep = rng.choice([None, 1, 1, 2, 2, 3])
        self.numbers = iter(range(1, 10_000))
        ops.note(KEEPING, self.keep)
        self.manager = self._opened()

    def _opened(self) -> CheckpointManager:
        manager = manager_on(self.ops, self.keep)
        restore(manager)
        manager.wait()
        return manager

    def act(self) -> None:
        actions = {
            self.save: 8,
            self.save_anew: 2,
            self.fail_to_save: 2,
            self.find_no_space: 1,
            self.set_aside: 2,
            self.prune: 1,
            self.restart: 1,
            self.be_killed: 3,
        }
        [action] = self.rng.choices(list(actions), list(actions.values()))
        action()

    @property
    def _next(self) -> int:
        return (self.manager.latest() or 0) + 1

    def save(self) -> None:
        self._save(self._next)

    def save_anew(self) -> None:
        self._save(self.manager.latest() or 1)

    def _save(self, step: int) -> None:
        save(self.ops, self.manager, step, next(self.numbers))

    def fail_to_save(self) -> None:
        self.ops.fail_fsync()
        self._fail(errno.EIO)

    def find_no_space(self) -> None:
        self.ops.capacity = 0
        self._fail(errno.ENOSPC)

    def _fail(self, number_of_error: int) -> None:
        step, number = self._next, next(self.numbers)
        self.ops.note(SAVING, step, number)
        error = self.manager.save(step, tiny(number)).exception(0)
        assert isinstance(error, StorageError)
        assert error.errno == number_of_error
        self.manager.wait()
        self.ops.note(FAILED, step, number)
        self.ops.capacity = None
        self.save()  # three failures in a row would be raised

    def set_aside(self) -> None:
        step = self.manager.latest()
        if step is not None:
            set_aside(self.ops, self.manager, step)

    def prune(self) -> None:
        self.ops.note(PRUNING, self.keep)
        self.manager.prune()
        self.manager.wait()
        self.ops.note(PRUNED)

    def restart(self) -> None:
        self.manager.close()
        self.manager = self._opened()

    def be_killed(self) -> None:
        step = self._next
        self.manager.close()
        dying = DyingFileOps(self.ops, self.rng.randrange(OPERATIONS_OF_A_SAVE))
        save_and_die(self.ops, dying, self.keep, step, next(self.numbers))
        self.manager = self._opened()


def record_random_run(seed: int, ops: CrashFileOps) -> None:
    rng = random.Random(seed)
    run = _Run(ops, rng)
    for _ in range(rng.randrange(4, 12)):
        run.act()
    run.manager.close()


def random_run(seed: int) -> Scenario:
    """What happens in it depends on the seed alone."""
    return Scenario(f"{_NAME}{seed}", partial(record_random_run, seed), recover_run)


def cut_random_run(seed: int, count: int) -> Tally:
    """For a process of its own, which says nothing but the result."""
    torch.set_num_threads(1)
    logging.getLogger("lastgood").setLevel(logging.CRITICAL)
    return Cutter(random_run(seed)).at_random(random.Random(seed), count)


def numbered_scenario(name: str) -> Scenario | None:
    """The one of this name, if it is one of those above."""
    if name.startswith(_NAME):
        return random_run(int(name.removeprefix(_NAME)))
    return killed(name.removeprefix(_KILLED)) if name.startswith(_KILLED) else None
