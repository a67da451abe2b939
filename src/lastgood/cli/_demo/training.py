"""A training script that may be killed at any moment: ``python -m lastgood.cli._demo.training SETTINGS``.

Read :func:`train`. What it takes to lose nothing but the steps since the last checkpoint are three lines:

- ``with CheckpointManager(root, every_steps=..., keep=...) as manager``: it knows where, when and what to keep, and at
  the end of the block it waits for what is still being written;
- ``manager.restore(state)`` at the start, from the newest checkpoint that is good;
- ``manager.save_if_due(step, state)`` after every step: the training goes on at once, and another process writes. What
  is staged survives the death of this process, and what is durable even a power cut.

The script reports what it does on its standard output, for the demo that started it.
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from lastgood import AsyncCheckpointer, CheckpointManager, KeepLast
from lastgood.cli._demo.batches import Batches
from lastgood.cli._demo.corpus import read_corpus
from lastgood.cli._demo.fingerprint import fingerprint
from lastgood.cli._demo.model import GPT
from lastgood.cli._demo.protocol import Event, Finished, Resumed, SaveBegins, Settings, StepDone, encode
from lastgood.cli._demo.saves import held_back, reported_saves
from lastgood.manager.random_states import RANDOM_STATES_KEY, take_random_states
from lastgood.manager.state import state_dict_of

_LEARNING_RATE = 2e-3


def train(settings: Settings, report: Callable[[Event], None]) -> None:
    """Train until all steps are done, from the newest good checkpoint if there is one.

    ``report`` is called by several threads.
    """
    training = Training(settings)
    with (
        reported_saves(report),
        CheckpointManager(
            settings.checkpoints,
            every_steps=settings.save_every,
            keep=KeepLast(settings.keep),
            random_states=True,
            on_failure="raise",
        ) as manager,
    ):
        started = time.perf_counter()
        training.step = manager.restore(training.state) or 0
        passed_over = tuple(passed.problem for passed in manager.passed_over if passed.is_damaged)
        report(Resumed(training.step, time.perf_counter() - started, passed_over, _writer_of(manager)))

        while training.step < settings.steps:
            started = time.perf_counter()
            with held_back() as held:
                loss = training.take_step()
            report(StepDone(training.step, loss, time.perf_counter() - started, sum(held)))

            if manager.is_due(training.step):
                report(SaveBegins(training.step))
            manager.save_if_due(training.step, training.state)

    report(Finished(training.fingerprint()))


class Training:
    """A model that learns, with everything that changes from one step to the next in :attr:`state`."""

    def __init__(self, settings: Settings) -> None:
        _seed_everything(settings.seed)
        self.model = GPT(settings.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=settings.steps)
        self.batches = Batches(
            read_corpus(), size=settings.batch_size, length=settings.model.context, seed=settings.seed
        )
        self.step = 0
        self.losses = torch.zeros(settings.steps, dtype=torch.float64)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "batches": self.batches,
            "losses": self.losses,
        }

    def take_step(self) -> float:
        """Learn from the next batch, and return the loss before that."""
        inputs, targets = self.batches.next_batch()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.losses[self.step] = loss.item()
        self.step += 1
        return loss.item()

    def fingerprint(self) -> str:
        """That of all that a checkpoint of this moment holds. Dropout draws from torch's generator, so its state
        belongs there as much as the weights."""
        return fingerprint({**state_dict_of(self.state), RANDOM_STATES_KEY: take_random_states()})


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(seed)


def _writer_of(manager: CheckpointManager) -> int | None:
    """The number of the process that writes: no training needs it, but the demo waits for its end."""
    assert isinstance(manager._checkpointer, AsyncCheckpointer)  # as no argument says otherwise
    process = manager._checkpointer._checkpoint_process
    process.process_creation_future.result()
    return None if process.process is None else process.process.processes[0].pid


def make_deterministic() -> None:
    """The same settings give the same bits: sums are taken in one order only.

    The order depends on the number of threads, so that is fixed. For a model of this size one thread is hardly
    slower than two, and it does not suffer when the cores are busy with something else.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def main() -> None:
    """The process that the demo starts, and kills."""
    settings = msgspec.json.decode(sys.argv[1], type=Settings)

    one_at_a_time = threading.Lock()

    def report(event: Event) -> None:
        with one_at_a_time:
            sys.stdout.buffer.write(encode(event))
            sys.stdout.buffer.flush()

    make_deterministic()
    train(settings, report)


if __name__ == "__main__":
    main()
