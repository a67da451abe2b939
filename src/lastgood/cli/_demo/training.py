"""A training script that may be killed at any moment: ``python -m lastgood.cli._demo.training SETTINGS``.

Read :func:`train`. What it takes to lose nothing but the steps since the last checkpoint:

- one object knows everything that changes while training, and gives it as a state dict (:class:`Training`);
- ``checkpointer.save(path, state)`` every few steps: when it returns, that checkpoint survives even a power cut;
- ``checkpointer.load(path)`` at the start, for the newest checkpoint that is good;
- an old checkpoint is removed only once a newer one is durable.

The script reports what it does on its standard output, for the demo that started it.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from lastgood import (
    Checkpointer,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    make_sync_checkpointer,
)
from lastgood.cli._demo.batches import Batches
from lastgood.cli._demo.corpus import read_corpus
from lastgood.cli._demo.fingerprint import fingerprint
from lastgood.cli._demo.model import GPT
from lastgood.cli._demo.protocol import Event, Finished, Resumed, SaveBegins, SaveDone, Settings, StepDone, encode

_LEARNING_RATE = 2e-3
_STEP_NAME = re.compile(r"step-(\d+)")


def train(settings: Settings, report: Callable[[Event], None]) -> None:
    """Train until all steps are done, from the newest good checkpoint if there is one."""
    directory = Path(settings.checkpoints)
    checkpointer = make_sync_checkpointer()
    training = Training(settings)
    report(resume(training, checkpointer, directory))

    while training.step < settings.steps:
        started = time.perf_counter()
        loss = training.take_step()
        report(StepDone(training.step, loss, time.perf_counter() - started))

        if training.step % settings.save_every == 0 or training.step == settings.steps:
            path = directory / f"step-{training.step}"
            report(SaveBegins(training.step))
            started = time.perf_counter()
            checkpointer.save(str(path), training.state_dict())
            report(SaveDone(training.step, time.perf_counter() - started, size_of(path)))
            remove_old(directory, settings.keep)

    checkpointer.close()
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
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return len(self.losses)

    def take_step(self) -> float:
        """Learn from the next batch, and return the loss before that."""
        inputs, targets = self.batches.next_batch()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def state_dict(self) -> dict[str, Any]:
        """The whole state. Dropout draws from torch's generator, so its state belongs here as much as the weights."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        self.losses = state["losses"].tolist()
        torch.set_rng_state(state["random"])


def resume(training: Training, checkpointer: Checkpointer, directory: Path) -> Resumed:
    """Load the newest checkpoint that is whole; those that are not are passed over, and named in the report.

    A save that was killed has left no checkpoint, or the one it was about to replace: nothing to repair here.
    """
    started = time.perf_counter()
    passed_over: list[str] = []
    for path in reversed(step_directories(directory)):
        try:
            training.load_state_dict(checkpointer.load(str(path)))
        except CheckpointNotFoundError:
            continue  # The very first save of this step was killed before there was anything to see.
        except (CorruptCheckpointError, UnsafeCheckpointError) as error:
            passed_over.append(str(error))
        else:
            break
    return Resumed(training.step, time.perf_counter() - started, tuple(passed_over))


def step_directories(directory: Path) -> list[Path]:
    """The directories of the steps in rising order. ``step-20.backup`` is somebody else's."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        name = _STEP_NAME.fullmatch(path.name)
        if name:
            found.append((int(name.group(1)), path))
    return [path for _, path in sorted(found)]


def remove_old(directory: Path, keep: int) -> None:
    """Leave the newest ``keep`` checkpoints. Call this only after a save has returned: the newest is durable then."""
    saved = [path for path in step_directories(directory) if size_of(path) > 0]
    for path in saved[:-keep]:
        shutil.rmtree(path)


def size_of(path: Path) -> int:
    """The bytes of the checkpoint in a step's directory; 0 if a killed save has left none."""
    return sum(file.stat().st_size for file in path.glob("checkpoint_*.pt"))


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

    def report(event: Event) -> None:
        sys.stdout.buffer.write(encode(event))
        sys.stdout.buffer.flush()

    make_deterministic()
    train(settings, report)


if __name__ == "__main__":
    main()
