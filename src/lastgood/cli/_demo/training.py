"""A training script that may be killed at any moment: ``python -m lastgood.cli._demo.training SETTINGS``.

Read :func:`train`. What it takes to lose nothing but the steps since the last checkpoint:

- one object knows everything that changes while training, and gives it as a state dict (:class:`Training`);
- ``checkpointer.save(path, state)`` every few steps: the training goes on at once, and another process writes. What is
  staged survives the death of this process, and what is durable even a power cut;
- ``checkpointer.load(path)`` at the start, for the newest checkpoint that is good;
- an old checkpoint is removed only once a newer one is durable;
- ``checkpointer.close()`` at the end, which waits for what is still being written.

The script reports what it does on its standard output, for the demo that started it.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from lastgood import (
    AsyncCheckpointer,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    make_async_checkpointer,
)
from lastgood.cli._demo.batches import Batches
from lastgood.cli._demo.corpus import read_corpus
from lastgood.cli._demo.directories import step_directories
from lastgood.cli._demo.fingerprint import fingerprint
from lastgood.cli._demo.model import GPT
from lastgood.cli._demo.protocol import Event, Finished, Resumed, Settings, StepDone, encode
from lastgood.cli._demo.saves import Saves, held_back

_LEARNING_RATE = 2e-3


def train(settings: Settings, report: Callable[[Event], None]) -> None:
    """Train until all steps are done, from the newest good checkpoint if there is one.

    ``report`` is called by several threads.
    """
    directory = Path(settings.checkpoints)
    with closing(make_async_checkpointer()) as checkpointer:
        training = Training(settings)
        resumed = resume(training, checkpointer, directory)
        report(resumed)
        saves = Saves(checkpointer, directory, keep=settings.keep, report=report)

        while training.step < settings.steps:
            started = time.perf_counter()
            with held_back() as held:
                loss = training.take_step()
            report(StepDone(training.step, loss, time.perf_counter() - started, sum(held)))

            if training.step == resumed.step + 1:
                # Now that the optimizer has its state, too. Should this fail, the save will say so.
                checkpointer.prewarm(training.state_dict())
            if training.step % settings.save_every == 0 or training.step == settings.steps:
                saves.begin(training.step, training.state_dict())
            saves.look()

        checkpointer.close()
        saves.finish()
    report(Finished(fingerprint(training.state_dict())))


class Training:
    """Everything that changes from one step to the next, and therefore everything that a checkpoint has to hold."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.model = GPT(settings.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=settings.steps)
        self.batches = Batches(
            read_corpus(), size=settings.batch_size, length=settings.model.context, seed=settings.seed
        )
        self.step = 0
        self.losses = torch.zeros(settings.steps, dtype=torch.float64)

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

    def state_dict(self) -> dict[str, Any]:
        """The whole state. Dropout draws from torch's generator, so its state belongs here as much as the weights."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "step": self.step,
            # A copy: the next steps write into it while it is being saved. (Optimizers wait by themselves.) It has the
            # same size from the start, so that what was worked out for one save serves for the next.
            "losses": self.losses.clone(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        self.step = state["step"]
        self.losses = state["losses"]
        torch.set_rng_state(state["random"])


def resume(training: Training, checkpointer: AsyncCheckpointer, directory: Path) -> Resumed:
    """Load the newest checkpoint that is whole; those that are not are passed over, and named in the report.

    A save that was killed has left no checkpoint, or the one it was about to replace: nothing to repair here. It may
    even still be written, by the checkpoint process of the training that was killed: then either is good. This
    training does the same steps again, and its own save to that path waits until the other is over.
    """
    started = time.perf_counter()
    passed_over: list[str] = []
    for path in reversed(step_directories(directory).values()):
        try:
            training.load_state_dict(checkpointer.load(str(path)))
        except CheckpointNotFoundError:
            continue  # The very first save of this step was killed before there was anything to see.
        except (CorruptCheckpointError, UnsafeCheckpointError) as error:
            passed_over.append(str(error))
        else:
            break
    seconds = time.perf_counter() - started
    return Resumed(training.step, seconds, tuple(passed_over), checkpoint_process=_writer_of(checkpointer))


def _writer_of(checkpointer: AsyncCheckpointer) -> int | None:
    """The number of the process that writes: no training needs it, but the demo waits for its end."""
    process = checkpointer._checkpoint_process
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
