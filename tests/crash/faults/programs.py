"""What runs in processes whose system calls are spoilt: the life of a run, by the public calls alone."""

import os
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.faults.cases import assert_threads_end, bound_all_waits, descriptors_below, errors_that_caused
from tests.crash.faults.numbered import number_names
from tests.helpers.saves import assert_state, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import ELEMENTS, make_run, restore, tiny
from tests.survival.trainers import process_of

import lastgood
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import LastgoodError
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast


class Outcome(NamedTuple):
    """How something ended: with ``value``, or with an error that says this."""

    value: Any = None
    error: str | None = None
    message: str = ""
    path: str | None = None
    is_lastgoods: bool = False
    causes: frozenset[int | None] = frozenset()

    @property
    def went_well(self) -> bool:
        return self.error is None


def outcome_of(error: BaseException) -> Outcome:
    path = getattr(error, "path", None)
    is_lastgoods = isinstance(error, LastgoodError)
    number = frozenset({error.errno}) if isinstance(error, OSError) else frozenset()
    causes = frozenset(errors_that_caused(error)) | number
    return Outcome(None, type(error).__name__, str(error), path, is_lastgoods, causes)


def tried(ask: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(ask())
    except AssertionError:
        raise
    except Exception as error:
        return outcome_of(error)


def configuration(timeout_secs: float) -> CheckpointerConfig:
    return CheckpointerConfig(
        writer_config=CheckpointWriterConfig(no_progress_timeout_secs=timeout_secs),
        process_config=CheckpointProcessConfig(no_progress_timeout_secs=60),
    )


# A run whose manager saves at once

ANEW = 33
"""The number of the state that is saved as step 3 the second time."""


def prepare_run(root: Path) -> None:
    make_run(root, [1, 2, 3])
    lastgood.save(tiny(1), root / "state.pt")


def life(manager: CheckpointManager, root: Path) -> list[tuple[str, Callable[[], Any]]]:
    """What the process does, each by its name."""

    def resume() -> int:
        step, state = restore(manager)
        assert step in (1, 2, 3)
        assert_state(state, step, ELEMENTS)
        manager.wait()
        return step

    def save(step: int, number: int) -> None:
        saved = manager.save(step, tiny(number))
        manager.wait()
        saved.result(0)

    def load_file() -> None:
        state = lastgood.load(root / "state.pt")
        assert_state(state, state["step"], ELEMENTS)
        assert state["step"] in (1, 2)

    return [
        ("resume", resume),
        ("save anew", lambda: save(3, ANEW)),
        ("save and prune", lambda: save(4, 4)),
        ("lastgood.save", lambda: lastgood.save(tiny(2), root / "state.pt")),
        ("lastgood.load", load_file),
    ]


def run(pipe: Connection, elsewhere: Path) -> None:
    """For each root that it gets: says who may be attached to, tells how each part of the life of a run there ends, and
    goes on when all is well again.
    """
    prepare_run(elsewhere)
    _live(elsewhere)  # so that all is imported
    number_names()
    while (order := pipe.recv()) is not None:
        root, timeout_secs, other_timeouts_secs = order
        bound_all_waits(other_timeouts_secs)
        manager = _manager(root, timeout_secs)
        pipe.send(os.getpid())
        pipe.recv()
        for name, ask in life(manager, root):
            pipe.send((name, tried(ask)))
        pipe.send("done")
        pipe.recv()
        assert_threads_end({threading.main_thread()})
        for step in (5, 6):
            repeat(partial(_save_and_wait, manager, step), timeout_secs)
        lastgood.save(tiny(3), root / "state.pt")
        manager.close()
        assert_threads_end({threading.main_thread()})
        pipe.send({"open": descriptors_below(root)})


def _save_and_wait(manager: CheckpointManager, step: int) -> None:
    manager.save(step, tiny(step)).result(0)
    manager.wait()


def repeat(ask: Callable[[], None], timeout_secs: float) -> None:
    """Do it; once more, if so short a time was too short for a busy machine."""
    for _ in range(5):
        failure = tried(ask)
        if failure.went_well:
            return
        assert failure.is_lastgoods, failure
        assert f"{timeout_secs:g} s" in failure.message, failure
    raise AssertionError("it never goes well again")


def _manager(root: Path, timeout_secs: float) -> CheckpointManager:
    return CheckpointManager(
        root, asynchronous=False, keep=KeepLast(2), preemption_signals=(), config=configuration(timeout_secs)
    )


def _live(root: Path) -> None:
    with _manager(root, 600) as manager:
        for _, ask in life(manager, root):
            ask()


# A checkpoint process


SAVED = {"checkpoint": 2, "new/checkpoint": 3}
"""What is saved while the calls count, and the numbers of the states. The first stands over number 1."""


def run_in_background(pipe: Connection, elsewhere: Path) -> None:
    """The same for its checkpoint process, which is always the same one, as long as it lives."""
    checkpointers: dict[float, AsyncCheckpointer] = {}
    while (order := pipe.recv()) is not None:
        root, timeout_secs, _ = order
        if timeout_secs not in checkpointers:
            config = configuration(timeout_secs)
            checkpointers[timeout_secs] = make_async_checkpointer(config, subprocess_init_fn=number_names)
        checkpointer = checkpointers[timeout_secs]

        def save(name: str, number: int, checkpointer: Any = checkpointer, root: Path = root) -> None:
            checkpointer.save(str(root / name), state_of(number))[1].result(PATIENCE_SECS)

        repeat(partial(save, "checkpoint", 1), timeout_secs)
        first = process_of(checkpointer)
        pipe.send(first)
        pipe.recv()
        for name, number in SAVED.items():
            pipe.send((name, tried(partial(save, name, number))))
        pipe.send("done")
        pipe.recv()
        for name in SAVED:
            repeat(partial(save, name, 4), timeout_secs)
        last = process_of(checkpointer)
        pipe.send({"died": first != last, "open": _opened_by(last, root)})
    for checkpointer in checkpointers.values():
        checkpointer.close()


def _opened_by(pid: int, root: Path) -> list[str]:
    descriptors = Path(f"/proc/{pid}/fd")
    return [name for entry in descriptors.iterdir() if (name := os.readlink(entry)).startswith(str(root))]
