"""What tests of asynchronous saves share: places where staging stops, calls that may have to wait, a small training."""

import contextlib
import copy
import mmap
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import PATIENCE_SECS
from tests.unit.capture.comparing import Comparison

from lastgood import _events
from lastgood._snapshot import Snapshot
from lastgood._staged_image import StagedImage
from lastgood._staging import job
from lastgood._staging.job import StagingJob
from lastgood.capture import capture
from lastgood.format.in_memory import finish
from lastgood.format.index_head import IndexHead
from lastgood.format.stream import stream_image

LARGE = 1 << 16
"""Storages of this many bytes are copied in the background: the smallest of them, in bytes."""

ELEMENTS = 3 * LARGE // 4
"""Of a float32 tensor that is copied in the background, in one piece."""


class Gate:
    """A place that is passed by many threads; while it is shut they wait there, or fail when it opens."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._free_passes = 0
        self._is_shut = False
        self._opened = 0
        self._waiting = 0
        self._failure: BaseException | None = None

    def shut(self, after: int = 0) -> None:
        """Let so many more pass, and no others."""
        with self._changed:
            self._is_shut, self._free_passes, self._failure = True, after, None

    def open(self, failure: BaseException | None = None) -> None:
        """Whoever waits goes on, or raises; whoever comes later passes."""
        with self._changed:
            self._failure, self._is_shut = failure, False
            self._opened += 1
            self._changed.notify_all()

    def let_others_pass(self) -> None:
        """Whoever comes later passes; whoever waits goes on waiting."""
        with self._changed:
            self._is_shut = False

    def wait_until_reached(self) -> None:
        """Return when somebody waits there."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting, PATIENCE_SECS), "nobody came to the gate"

    def pass_by(self) -> None:
        with self._changed:
            if self._is_shut and self._free_passes:
                self._free_passes -= 1
                return
            if self._is_shut:
                opened = self._opened
                self._waiting += 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._opened > opened, PATIENCE_SECS), "the gate never opened"
                self._waiting -= 1
                if self._failure is not None:
                    raise self._failure


@contextlib.contextmanager
def gate_before_copies() -> Iterator[Gate]:
    """A gate, open at first, that every copy of 64 KiB and more has to pass: that is, those in the background."""
    gate = Gate()
    real = job.copy_memory

    def copy_memory(target: int, source: int, nbytes: int) -> None:
        if nbytes >= LARGE:
            gate.pass_by()
        real(target, source, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "copy_memory", copy_memory)
        try:
            yield gate
        finally:
            gate.open()


class Calls:
    """Calls in threads of their own, and what became of them so far, in order.

    ``"waits"``: it has come to where it waits until staging is over. ``"done"``: it has returned.
    """

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self, function: Callable[[], object]) -> None:
        def call() -> None:
            try:
                function()
            except BaseException as error:
                self._news.put(error)
            else:
                self._news.put("done")

        self._threads.append(threading.Thread(target=call, daemon=True))
        self._threads[-1].start()

    def next(self) -> Any:
        """What comes next; an exception that a call raised is raised here."""
        news = self._news.get(timeout=PATIENCE_SECS)
        if isinstance(news, BaseException):
            raise news
        return news

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_SECS)


@contextlib.contextmanager
def watched_calls() -> Iterator[Calls]:
    """Whoever waits for staging to be over is heard of by the calls."""
    calls = Calls()
    real = StagingJob.wait

    def wait(self: StagingJob) -> None:
        calls._news.put("waits")
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagingJob, "wait", wait)
        try:
            yield calls
        finally:
            calls.join()


@contextlib.contextmanager
def noted_events() -> Iterator[list[_events.Event]]:
    """All phases that end meanwhile."""
    events: list[_events.Event] = []
    unsubscribe = _events.subscribe(events.append)
    try:
        yield events
    finally:
        unsubscribe()


def assert_equal(found: Any, expected: Any) -> None:
    """Bit for bit, and in what is shared; neither is changed."""
    Comparison().same(found, expected)


class Training:
    """A model with batch normalisation, whose tensors are partly small and partly large, and its optimizer."""

    def __init__(self, make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], seed: int) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.model = torch.nn.Sequential(
                torch.nn.Linear(64, 512), torch.nn.BatchNorm1d(512), torch.nn.ReLU(), torch.nn.Linear(512, 8)
            )
        self._generator = torch.Generator().manual_seed(seed)
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.averages = {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """A state dict of the tensors themselves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
        }

    def state_now(self) -> dict[str, Any]:
        """The same, of copies."""
        return copy.deepcopy(self.state())

    def forward_and_backward(self) -> None:
        self.model.train()
        inputs = torch.rand(16, 64, generator=self._generator)
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()

    def step(self) -> None:
        self.optimizer.step()

    def average(self) -> None:
        """Moving averages as many keep them: past autograd."""
        for name, value in self.model.named_parameters():
            self.averages[name].data.mul_(0.5).add_(value.data, alpha=0.5)


def state_of_large_tensors(seed: int) -> dict[str, Any]:
    """Two tensors that are copied in the background, and one that is copied at once."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {name: torch.rand(ELEMENTS, generator=generator) for name in ("weights", "others")},
        "bias": torch.rand(10, generator=generator),
        "step": seed,
    }


class Note:
    """A value that only a pickle can describe."""

    def __init__(self, text: str, tensor: torch.Tensor) -> None:
        self.text = text
        self.tensor = tensor


# Files


HEAD = IndexHead(save_id="0123456789abcdef" * 2, rank=0, world_size=1, step=7, independent=False)


def file_of_snapshot(snapshot: Snapshot, head: IndexHead = HEAD) -> bytes:
    """The file that a checkpoint process makes of what was staged."""
    placement = snapshot.placed.result(0)
    memory = memoryview(mmap.mmap(placement.descriptor, placement.arena_size))
    image = StagedImage(memory, placement.description)
    layout = image.layout(head)
    for _ in finish(memory, layout, head, image.index_body, lambda end: None):
        pass
    return bytes(memory[: layout.file_size])


def file_of_synchronous_save(state: Any, head: IndexHead = HEAD) -> bytes:
    """The file that a synchronous save writes."""
    image = capture(state).image(head)
    pieces = _Pieces(image.size)
    stream_image(image, pieces)
    assert pieces.position == image.size
    return bytes(pieces.memory)


class _Pieces:
    def __init__(self, size: int) -> None:
        self.memory = memoryview(bytearray(size))
        self.position = 0

    def append(self, data: bytes) -> None:
        self.memory[self.position : self.position + len(data)] = data
        self.position += len(data)

    def window(self, limit: int) -> memoryview:
        return self.memory[self.position : self.position + limit]

    def advance(self, count: int) -> None:
        self.position += count


# Memory of this process


def arenas_open() -> int:
    """How many arenas this process has open."""
    found = set()
    for descriptor, name in open_files().items():
        if "memfd:lastgood-arena" in name:
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(os.fstat(descriptor).st_ino)
    return len(found)


def open_files() -> dict[int, str]:
    """What this process has open, by descriptor."""
    names = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            names[int(descriptor)] = os.readlink(f"/proc/self/fd/{descriptor}")
    return names


def arena_bytes_mapped() -> int:
    """How many bytes of arenas this process has mapped."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:lastgood-arena" in line:
            start, end = re.findall("[0-9a-f]+", line)[:2]
            found += int(end, 16) - int(start, 16)
    return found


def shared_memory_files() -> set[str]:
    """What this process has open or mapped in /dev/shm."""
    names = [*open_files().values(), *Path("/proc/self/maps").read_text().splitlines()]
    return {name[name.index("/dev/shm/") :] for name in names if "/dev/shm/" in name}
