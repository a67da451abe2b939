"""Copies from an accelerator, with a runtime that stands for one: what is queued there arrives when it is waited for.

The order of things is what can be shown without a device: it was never run on one.
"""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.asynchronous import ELEMENTS, Gate, assert_equal, state_of_large_tensors
from tests.helpers.workers import PATIENCE_SECS

from lastgood._memory import memory_at
from lastgood._staging import job as job_module
from lastgood._staging.arena import Arena
from lastgood._staging.arena_pool import ArenaPool
from lastgood._staging.device_copies import DeviceCopies, PinnedArena
from lastgood._staging.job import StagingJob
from lastgood._staging.plan import Planner, Taken
from lastgood.errors import TornSnapshotError
from lastgood.staging import CheckpointStagerConfig, DefaultStager

DEVICE = torch.device("cpu")
"""What stands for the device; the host is told from it by nothing but the plan."""


class OnDevice(torch.Tensor):
    """A tensor that an allocator watches."""

    def record_stream(self, stream: "Stream") -> None:  # type: ignore[override]
        stream.runtime.note("record_stream", stream.name)


class Stream:
    def __init__(self, runtime: "Runtime", name: str) -> None:
        self.runtime = runtime
        self.name = name
        self.queue: list[Any] = []

    def wait_event(self, event: "Event") -> None:
        self.runtime.note("wait_event", self.name, event.name)


class Event:
    def __init__(self, runtime: "Runtime", name: str) -> None:
        self._runtime = runtime
        self.name = name
        self._stream: Stream | None = None
        self._behind = 0

    def record(self, stream: Stream) -> None:
        self._runtime.note("record", stream.name, self.name)
        self._stream, self._behind = stream, len(stream.queue)

    def synchronize(self) -> None:
        self._runtime.note("synchronize", self.name)
        self._runtime.arrivals.pass_by()
        assert self._stream is not None
        with self._runtime.lock:
            queue = self._stream.queue
            for number in range(self._behind):
                if queue[number] is not None:
                    queue[number]()
                    queue[number] = None


class Runtime:
    """Notes its calls in order. A copy that was queued is made when somebody waits for an event behind it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.lock = threading.RLock()
        self.arrivals = Gate()
        self._events = 0
        self._streams = 0
        self._here = threading.local()
        self.copy_now = torch._foreach_copy_

    def note(self, *call: Any) -> None:
        with self.lock:
            self.calls.append(call)

    def Event(self) -> Event:
        with self.lock:
            self._events += 1
            return Event(self, f"event {self._events}")

    def Stream(self, device: torch.device) -> Stream:
        with self.lock:
            self._streams += 1
            self.note("Stream", device)
            return Stream(self, f"side {self._streams}")

    def current_stream(self, device: torch.device) -> Stream:
        self.note("current_stream", device)
        return Stream(self, "compute")

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = None

    def foreach_copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool) -> None:
        stream: Stream | None = getattr(self._here, "stream", None)
        assert stream is not None, "a copy in the way of the computation"
        self.note("copy", stream.name, len(sources), non_blocking)
        with self.lock:
            stream.queue.append(
                lambda: self.copy_now(targets, [source.as_subclass(torch.Tensor) for source in sources])
            )

    def of(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Everything that is staged stands on a device."""
    runtime = Runtime()
    monkeypatch.setattr(torch, "_foreach_copy_", runtime.foreach_copy)
    monkeypatch.setattr(job_module, "runtime_of", lambda device: runtime)
    real = Planner.take

    def take(self: Planner, state: Any) -> Taken:
        taken = real(self, state)
        for number, size in enumerate(taken.plan.sizes):
            if size:
                part = torch.frombuffer(memory_at(taken.addresses[number], size), dtype=torch.uint8)
                taken.device_parts[number] = part.as_subclass(OnDevice)
                taken.addresses[number] = 0
        return taken

    monkeypatch.setattr(Planner, "take", take)
    yield runtime
    runtime.arrivals.open()


@pytest.fixture
def before_preparing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    real = StagingJob.prepare

    def prepare(self: StagingJob, planner: Planner, **options: Any) -> int:
        gate.pass_by()
        return real(self, planner, **options)

    monkeypatch.setattr(StagingJob, "prepare", prepare)
    yield gate
    gate.open()


def test_the_moment_of_the_call_is_marked_on_the_compute_stream_before_it_returns(
    runtime: Runtime, before_preparing: Gate
) -> None:
    with DefaultStager() as stager:
        before_preparing.shut()
        future = stager.stage({"large": torch.ones(ELEMENTS)})
        assert runtime.calls == [("current_stream", DEVICE), ("record", "compute", "event 1"), ("Stream", DEVICE)]
        before_preparing.open()
        assert isinstance(future, Future)
        assert torch.equal(future.result(PATIENCE_SECS)["large"], torch.ones(ELEMENTS))


def test_copies_wait_for_that_moment_and_are_waited_for(runtime: Runtime, rng_seed: int) -> None:
    with DefaultStager() as stager:
        for _ in range(3):
            runtime.calls.clear()
            state = state_of_large_tensors(rng_seed)
            future = stager.stage(state)
            assert isinstance(future, Future)
            assert_equal(future.result(PATIENCE_SECS), state)
            (moment,) = [call[2] for call in runtime.of("record") if call[1] == "compute"]
            copies = runtime.of("copy")
            assert len(copies) == 3, "one of all small tensors, one of each large one"
            (side,) = {call[1] for call in copies}
            assert side.startswith("side")
            assert runtime.of("wait_event") == [("wait_event", side, moment)] * 3
            assert runtime.of("record_stream") == [("record_stream", side)] * 3
            arrived = [call[2] for call in runtime.of("record") if call[1] == side]
            assert sorted(call[1] for call in runtime.of("synchronize")) == sorted(arrived)
            first_copy = runtime.calls.index(copies[0])
            assert runtime.calls.index(("wait_event", side, moment)) < first_copy


def test_staging_is_not_over_before_the_last_byte_has_arrived(runtime: Runtime) -> None:
    state = state_of_large_tensors(1)
    del state["bias"]  # what is small is waited for at once
    with DefaultStager() as stager:
        runtime.arrivals.shut()
        future = stager.stage(state)
        assert isinstance(future, Future)
        runtime.arrivals.wait_until_reached()
        assert not future.done()
        assert stager.current is not None
        runtime.arrivals.open()
        assert_equal(future.result(PATIENCE_SECS), state)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_copies_are_queued_without_blocking_if_so_configured(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, non_blocking: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with DefaultStager(CheckpointStagerConfig(use_non_blocking_copy=non_blocking)) as stager:
        stager.stage(state_of_large_tensors(1)).result(PATIENCE_SECS)  # type: ignore[union-attr]
    assert {call[3] for call in runtime.of("copy")} == {non_blocking}


def test_a_tensor_on_a_device_that_was_changed_in_place_is_found_torn(runtime: Runtime, before_preparing: Gate) -> None:
    state = state_of_large_tensors(1)
    with DefaultStager() as stager:
        before_preparing.shut()
        future = stager.stage(state)
        state["model"]["others"].add_(1)
        before_preparing.open()
        assert isinstance(future, Future)
        error = future.exception(PATIENCE_SECS)
        assert isinstance(error, TornSnapshotError)
        assert error.tensor == "model.others"


def test_a_copy_that_fails_fails_the_staging(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: Event) -> None:
        raise ChildProcessError("the device has fallen off the bus")

    state = {"large": torch.ones(ELEMENTS)}
    with DefaultStager() as stager:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Event, "synchronize", fail)
            future = stager.stage(state)
            assert isinstance(future, Future)
            with pytest.raises(ChildProcessError, match="off the bus"):
                future.result(PATIENCE_SECS)
        future = stager.stage(state)
        assert isinstance(future, Future)
        assert_equal(future.result(PATIENCE_SECS), state)


def test_the_streams_are_those_of_the_device_of_the_tensors() -> None:
    runtime, device = Runtime(), torch.device("cuda:3")
    DeviceCopies(runtime, device, non_blocking=True)
    assert runtime.calls == [("current_stream", device), ("record", "compute", "event 1"), ("Stream", device)]


# The pinned arena


class Cudart:
    """Stands for CUDA's runtime; checks that what is registered and unregistered is mapped."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.result = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert is_mapped(address, size)
        self.calls.append(("register", address, size))
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        registered = {call[1]: call[2] for call in self.calls if call[0] == "register"}
        assert is_mapped(address, registered[address])
        self.calls.append(("unregister", address))
        return 0

    def cudart(self) -> "Cudart":
        return self

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


def is_mapped(address: int, size: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address and address + size <= end:
            return "memfd:lastgood-arena" in line
    return False


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", cudart.cudart)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return cudart


def test_an_arena_is_pinned_whole_once_for_each_mapping(cudart: Cudart) -> None:
    arena = Arena()
    pinned = PinnedArena(cudart)
    arena.resize(1 << 20)
    pinned.register(arena)
    pinned.register(arena)
    assert cudart.calls == [("register", arena.address, 1 << 20)]
    pinned.unregister()
    pinned.unregister()
    arena.resize(2 << 20)
    pinned.register(arena)
    pinned.unregister()
    arena.close()
    assert cudart.names() == ["register", "unregister", "register", "unregister"]


def test_an_arena_that_cannot_be_pinned_is_used_as_it_is(cudart: Cudart, caplog: pytest.LogCaptureFixture) -> None:
    cudart.result = 2
    pool = ArenaPool(1, pinned=True)
    pool.give_back(pool.make(1 << 20, None))
    pool.close()
    assert cudart.names() == ["register"]
    assert "cannot be pinned" in caplog.text


def test_staging_pins_its_arena_once_and_lets_it_go_before_it_is_unmapped(cudart: Cudart) -> None:
    config = CheckpointStagerConfig(use_async_staging=False, use_pinned_memory=True, use_non_blocking_copy=False)
    with DefaultStager(config) as stager:
        for _ in range(5):
            assert_equal(stager.stage(state_of_large_tensors(1)), state_of_large_tensors(1))
        assert cudart.names() == ["register"]
        stager.stage({"larger": torch.ones(4 << 20)})
        assert cudart.names() == ["register", "unregister", "register"]
    assert cudart.names() == ["register", "unregister"] * 2


def test_memory_is_not_pinned_if_so_configured(cudart: Cudart) -> None:
    with DefaultStager(CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)) as stager:
        stager.stage(state_of_large_tensors(1)).result(PATIENCE_SECS)  # type: ignore[union-attr]
    assert not cudart.calls
