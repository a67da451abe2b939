"""What tests of saving share: states, comparisons, a barrier among threads, hooks that take notes."""

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.distributed.barrier_ranks import finished, start
from tests.storage.recording import Call, RecordingFileOps

from lastgood.barriers import Barrier
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

STEPS = {"fsync", "replace", "link", "fsync_directory", "pre_commit", "barrier", "post_commit", "abandon"}
"""The calls whose order makes a save durable and atomic."""


def state_of(number: int, elements: int = 50_000) -> dict[str, Any]:
    """A small state that is another one for every number; large enough for direct I/O where there is any."""
    generator = torch.Generator().manual_seed(number)
    weights = torch.rand(elements, generator=generator)
    return {"model": {"weights": weights, "bias": weights[:10] + number}, "step": number}


def assert_state(found: dict[str, Any], number: int, elements: int = 50_000) -> None:
    expected = state_of(number, elements)
    assert found["step"] == number
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor)


def read(path: Path | str, rank: int = 0, world_size: int = 1, **options: Any) -> dict[str, Any]:
    found, missing = CheckpointReader(RankInfo(rank, world_size)).read(str(path), **options)
    assert missing == []
    return found


def writer_of(
    rank: int = 0,
    world_size: int = 1,
    barrier: Barrier | None = None,
    hook: WriterHook | None = None,
    *,
    ops: RecordingFileOps | None = None,
    **config: Any,
) -> CheckpointWriter:
    storage = LocalStorage(ops)
    return CheckpointWriter(
        CheckpointWriterConfig(**config), RankInfo(rank, world_size), barrier, hook, storage=storage
    )


def save(path: Path | str, number: int, rank: int = 0, world_size: int = 1) -> None:
    """A save of the plain kind; several ranks are independent."""
    writer_of(rank, world_size).write(str(path), state_of(number))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def temporaries(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".tmp")]


class NotingHook(WriterHook):
    """Notes its calls among those to the operating system. It does not call ``super().__init__``."""

    def __init__(self, ops: RecordingFileOps) -> None:
        self.ops = ops

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self.ops.calls.append(Call("pre_commit", path, (kwargs,)))

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self.ops.calls.append(Call("post_commit", path, (kwargs,)))


class NotingBarrier(Barrier):
    """A barrier among the threads of a test (by default one that nobody else comes to), which notes its calls."""

    def __init__(self, ops: RecordingFileOps | None = None, meeting: threading.Barrier | None = None) -> None:
        self.ops = RecordingFileOps() if ops is None else ops
        self.meeting = meeting

    def execute_barrier(self) -> None:
        if self.meeting is not None:
            self.meeting.wait(60)
        self.ops.calls.append(Call("barrier", "", ()))

    def abandon(self, reason: str) -> None:
        self.ops.calls.append(Call("abandon", "", (reason,)))
        if self.meeting is not None:
            self.meeting.abort()


def steps(ops: RecordingFileOps, since: int = 0) -> list[str]:
    return [call.name for call in ops.calls[since:] if call.name in STEPS]


def commit_together(path: Path, number: int, world_size: int = 2, **noted: Any) -> list[BaseException | None]:
    """Save with all ranks, as threads of this process, each its own state; how each ended."""
    meeting = threading.Barrier(world_size)
    writers = [writer_of(rank, world_size, NotingBarrier(meeting=meeting)) for rank in range(world_size)]
    writes = [partial(writer.write, **noted) for writer in writers]
    return finished([start(write, str(path), state_of(number + rank)) for rank, write in enumerate(writes)])
