"""What runs in the processes that are killed: a training with an asynchronous manager, as fast as it can save."""

import os
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.crash.kills.places import Places, watch_checkpoint_process
from tests.crash.kills.training import Training
from tests.helpers.workers import PATIENCE_SECS

from lastgood import _events
from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import LastgoodError
from lastgood.manager import checkpoint_manager
from lastgood.manager.catalog import step_of
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.retention import KeepLast

KEPT = 2
MOST_STEPS = 300
NUMBERS_A_LIFE = MOST_STEPS + 1
"""States have other numbers in every life, so that whose state was found shows, too; the last one is left over."""

OF_A_RANK = {"weights": 3 << 16, "others": 1 << 16, "bias": 100}
"""1 MiB for each of several ranks."""


def number_of(life: int, count: int, rank: int = 0, world_size: int = 1) -> int:
    """That of the state of a rank at the ``count``-th save of a life."""
    return (NUMBERS_A_LIFE * life + count) * world_size + rank


class Talk:
    """What a process says to its test, from any of its threads, and what it is told: to go on, or to finish."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._may_go_on = threading.Event()
        self.is_to_finish = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, *words: Any) -> None:
        with self._lock:
            self._pipe.send(words)

    def wait(self) -> None:
        self._may_go_on.wait()
        self._may_go_on.clear()

    def _listen(self) -> None:
        while True:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(3)  # the test itself is gone
            (self._may_go_on if order == "go on" else self.is_to_finish).set()


def train_alone(pipe: Connection, from_process: Connection, orders: tuple[str, str], root: str, life: int) -> None:
    """Resume and save until told to finish, or killed.

    ``orders`` name the files of orders for this process and for the checkpoint process, whose own words come by
    ``from_process``.
    """
    _train(Talk(pipe), from_process, orders, root, life, Training())


def train_together(
    pipe: Connection,
    from_process: Connection,
    orders: tuple[str, str],
    root: str,
    life: int,
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_secs: int,
) -> None:
    """The same as one of several ranks, which save the same steps, until others are gone.

    The checkpoint processes wait ``timeout_secs`` for one of which nobody can say that it is gone.
    """
    from tests.manager.ranks import join  # imports much that a trainer alone does without

    join(rank, world_size, rendezvous)
    talk = Talk(pipe)
    try:
        _train(talk, from_process, orders, root, life, Training(rank, OF_A_RANK), rank, world_size, timeout_secs)
    except LastgoodError as error:
        talk.say("lost", f"{type(error).__name__}: {error}")
        sys.exit(1)  # as a script does: others that wait for this rank notice by that


def _train(
    talk: Talk,
    from_process: Connection,
    orders: tuple[str, str],
    root: str,
    life: int,
    training: Training,
    rank: int = 0,
    world_size: int = 1,
    timeout_secs: int = 600,
) -> None:
    Places(orders[0], talk.say, talk.wait)
    _have_checkpoint_processes_watched(from_process, orders[1])
    _events.subscribe(lambda event: _tell_staged(talk, event))
    config = CheckpointerConfig()
    config.process_config.nice = 0
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS
    config.writer_config.write_barrier_timeout_secs = timeout_secs
    with CheckpointManager(root, config=config, keep=KeepLast(KEPT), preemption_signals=()) as manager:
        manager.prewarm(training.state())
        state = training.state()
        first = manager.restore(state) or 0
        training.took_over(state)
        talk.say("resumed", first, training.number)
        for count in range(1, MOST_STEPS):
            with manager.hold():
                training.go_to(number_of(life, count, rank, world_size))
            talk.say("asked", first + count, training.number)
            manager.save(first + count, training.state()).add_done_callback(_Tell(talk, first + count))
            if manager._ranks.any_of(talk.is_to_finish.is_set())[0]:
                break
    talk.say("closed")


class _Tell:
    """Says how a save ended."""

    def __init__(self, talk: Talk, step: int) -> None:
        self._talk = talk
        self._step = step

    def __call__(self, saved: "Future[None]") -> None:
        error = saved.exception()
        if error is None:
            self._talk.say("durable", self._step)
        else:
            self._talk.say("failed", self._step, f"{type(error).__name__}: {error}")


def _tell_staged(talk: Talk, event: _events.Event) -> None:
    """Published once the stage future of a save has resolved."""
    if event.phase == "staged" and event.error is None:
        talk.say("staged", step_of(Path(event.path).name))


def _have_checkpoint_processes_watched(pipe: Connection, orders: str) -> None:
    def make(config: Any, ranks: Any, storage: Any, coordination: Any, *, asynchronous: bool) -> AsyncCheckpointer:
        assert asynchronous
        checkpointer = make_async_checkpointer(
            config,
            ranks.info,
            subprocess_init_fn=watch_checkpoint_process,
            subprocess_init_args=(pipe, orders),
            coordination=coordination,
        )
        checkpointer.leave_failures_to_futures()
        return checkpointer

    checkpoint_manager.make_checkpointer = make
