"""What tests of managers share: small runs on disk, managers that write at once, damage, what the log says."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.helpers.saves import assert_state, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.storage.recording import RecordingFileOps
from tests.unit.loading.files import archive_of

from lastgood.format.epoch import EPOCH_NAME
from lastgood.manager.catalog import RUN_LOG_NAME
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.run_log import read_run_log
from lastgood.storage.local import LocalStorage

ELEMENTS = 100
"""So many floats are in the state of a small run."""

Kind = TypeVar("Kind")


def tiny(number: int) -> dict[str, Any]:
    """A state that is another one for every number."""
    return state_of(number, ELEMENTS)


def manager_of(root: Path | str, *, ops: Any = None, **options: Any) -> CheckpointManager:
    """A manager that has saved when ``save`` returns, and does without signals; ``ops`` are all its file operations."""
    storage = None if ops is None else LocalStorage(ops)
    return CheckpointManager(root, **{"asynchronous": False, "preemption_signals": (), **options}, storage=storage)


def make_run(root: Path, steps: list[int]) -> None:
    """The state of step n is that of number n."""
    with manager_of(root) as manager:
        for step in steps:
            manager.save(step, tiny(step), metrics={"loss": 1 / (1 + step)}).result(0)


def restore(manager: CheckpointManager, step: int | None = None) -> tuple[int | None, dict[str, Any]]:
    """The step that the manager resumes from, and the state that it fills."""
    state = tiny(987_654)
    return manager.restore(state, step), state


def assert_resumes(root: Path, step: int, number: int | None = None) -> tuple[int, ...]:
    """That a new manager goes on from ``step``, bit for bit; the steps that it passed over."""
    with manager_of(root) as manager:
        found, state = restore(manager)
        assert found == step
        assert_state(state, step if number is None else number, ELEMENTS)
        return tuple(passed.step for passed in manager.passed_over)


def file_of(root: Path, step: int, rank: int = 0) -> Path:
    return root / f"step-{step}" / f"checkpoint_{rank}.pt"


def flip(file: Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= mask
    file.write_bytes(data)


def damage(file: Path) -> None:
    """Change one byte of a tensor's data."""
    with archive_of(file) as archive:
        offset = archive.layout.storages[0].data_offset
    flip(file, offset)


def directories(root: Path) -> list[str]:
    """The names under the root, without those of the run's log and of the record of jobs."""
    return sorted(path.name for path in root.iterdir() if path.name not in (RUN_LOG_NAME, EPOCH_NAME))


def logged(root: Path, kind: type[Kind]) -> list[Kind]:
    """The records of one kind in the run's log."""
    return [record for record in read_run_log(LocalStorage(), str(root)) if isinstance(record, kind)]


def failing_ops(name: str, number: int) -> RecordingFileOps:
    ops = RecordingFileOps()
    ops.fail(name, number)
    return ops


@contextmanager
def lock_of(root: Path, step: int) -> Iterator[None]:
    """As somebody who is writing that step holds it."""
    lock = LocalStorage().try_lock(str(file_of(root, step)))
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def word_in_the_log(text: str) -> Iterator[threading.Event]:
    """An event that is set once lastgood logs something with this text in it, by whatever thread."""
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                said.set()

    logger, listener = logging.getLogger("lastgood"), Listener()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE_SECS), "what the test waits for does not happen"
