"""Hazards 10 and 14: many saves in a row cost no more than a few, in the trainer and in its checkpoint process."""

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.survival.traces import mapped_shared_memory, names, shared_memory
from tests.survival.trainers import file_in, process_of

import lastgood
from lastgood.builder import make_async_checkpointer

FIRST, LAST = 50, 200
FEWEST = 20
"""Tells a leak of one of something a save, or even every seventh, from what happens to be there at the moment."""


def state_at(number: int, elements: int) -> dict[str, Any]:
    """Values change from save to save; now and then the shapes do, and what there is."""
    is_odd_one = number % 10 == 7
    size = elements + elements // 8 * (number % 3) if is_odd_one else elements
    return {
        "weights": torch.full((size,), float(number)),
        "layers": [torch.full((100 + (number if is_odd_one else 0),), float(layer)) for layer in range(30)],
        "step": number,
        "log": "x" * (number % 10),
        **({f"extra-{number}": torch.ones(number)} if is_odd_one else {}),
    }


def costs_of(pid: int) -> dict[str, int]:
    """What a process holds. Memory in bytes; that of mapped files does not count, but shared memory does."""
    memory = {}
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssShmem"):
                memory[name] = 1024 * int(value.split()[0])
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "shared memory files": len(shared_memory(pid) | mapped_shared_memory(pid)),
        "bytes of shared memory": sum(shared_memory(pid).values()),
        "mapped bytes of shared memory": sum(mapped_shared_memory(pid).values()),
        "resident bytes": sum(memory.values()),
    }


def save_many_times(pipe: Connection, path: str, elements: int) -> None:
    """Sends the costs of trainer and checkpoint process after each save."""
    checkpointer = make_async_checkpointer()
    for number in range(1, LAST + 1):
        checkpointer.save(path, state_at(number, elements))[1].result(PATIENCE_SECS)
        pipe.send((costs_of(os.getpid()), costs_of(process_of(checkpointer))))
    checkpointer.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param(1_500_000, id="6 MB"),
        pytest.param(25_000_000, id="100 MB", marks=[pytest.mark.crash, pytest.mark.timeout(1800)]),
    ],
)
def test_hazard_10_and_14_two_hundred_saves_of_changing_state_hold_no_more_than_fifty(
    worker: Worker, tmp_path: Path, elements: int
) -> None:
    worker.start(save_many_times, str(tmp_path / "a"), elements, with_pipe=True)
    # Half of what a leak of 1/50 of the state a save would add up to.
    most_bytes = (LAST - FIRST) * 4 * elements // 50 // 2
    costs = [worker.receive() for _ in range(LAST)]
    for process, before, after in zip(("trainer", "process"), costs[FIRST - 1], costs[LAST - 1], strict=True):
        print(process, before, after)
        for what, count in after.items():
            most = most_bytes if "bytes" in what else FEWEST
            assert count <= before[what] + most, (process, what)
    worker.result()
    assert lastgood.load(file_in(tmp_path / "a"))["step"] == LAST
    assert names(tmp_path / "a") == ["checkpoint_0.pt"]
