"""Staging by itself: what comes back, that it stays what it was, and that no failure passes for a success."""

import copy
import gc
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.helpers.asynchronous import (
    ELEMENTS,
    LARGE,
    Gate,
    Note,
    arenas_open,
    assert_equal,
    file_of_snapshot,
    file_of_synchronous_save,
    gate_before_copies,
    noted_events,
    state_of_large_tensors,
)
from tests.helpers.saves import contents
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.process import in_child
from tests.process.processes import pipe, receive
from tests.unit.capture.states import DTYPES, states

from lastgood import staging
from lastgood._snapshot import Snapshot
from lastgood._staging import arena as arena_module
from lastgood._staging import job as job_module
from lastgood._staging.witnesses import Witnesses
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import ArenaMemoryError, ConfigError, StagingError, UnsafeValueWarning, UnsupportedStateError
from lastgood.staging import CheckpointStager, CheckpointStagerConfig, DefaultStager

HALF = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def synchronous(**options: Any) -> DefaultStager:
    return DefaultStager(CheckpointStagerConfig(use_async_staging=False, **options))


def staged_in(stager: DefaultStager, state: dict[str, Any]) -> dict[str, Any]:
    staged = stager.stage(state)
    return staged.result(PATIENCE_SECS) if isinstance(staged, Future) else staged


# What comes back


def test_synchronous_staging_gives_a_plain_dict() -> None:
    with synchronous() as stager:
        staged = stager.stage({"a": torch.ones(3), "step": 1})
        assert type(staged) is dict
        assert_equal(staged, {"a": torch.ones(3), "step": 1})


def test_asynchronous_staging_gives_a_future_of_a_plain_dict_built_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[str] = []
    real = staging._rebuild

    def rebuild(snapshot: Snapshot) -> dict[str, Any]:
        built.append(threading.current_thread().name)
        return real(snapshot)

    monkeypatch.setattr(staging, "_rebuild", rebuild)
    state = state_of_large_tensors(1)
    with DefaultStager() as stager:
        future = stager.stage(state)
        assert isinstance(future, Future)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECS)
        assert future.exception() is None
        assert built == [], "nobody has asked yet"
        staged = future.result(PATIENCE_SECS)
        assert type(staged) is dict
        assert_equal(staged, state)
        assert future.result() is staged
        assert built == [threading.current_thread().name]


def kinds_of_values() -> dict[str, Any]:
    base = torch.arange(2 * ELEMENTS, dtype=torch.float32)
    return {
        "tuple": (torch.ones(3), (1, "two", None), ()),
        "empty": [torch.empty(0), torch.empty(0, 3), torch.empty(2, 0, dtype=torch.int64)],
        "not contiguous": [base.reshape(2, -1).t(), base[::2], base.flip(0)[:5], base[:1].expand(7)],
        "tied": [base, base],
        "views": [base[5:10], base[8:ELEMENTS], base.view(torch.int32)[3:7]],
        "parameters": torch.nn.ParameterList([torch.rand(3), torch.rand(ELEMENTS)]).state_dict(),
        "required": torch.nn.Parameter(base),
        "dtypes": {str(dtype): torch.arange(48, dtype=torch.uint8).view(dtype) for dtype in DTYPES},
        "conjugate": torch.rand(3, dtype=torch.complex64).conj(),
        "scalars": [torch.tensor(3), torch.tensor(True), 1, 1.5, "s", b"b", None, 1j, float("nan")],
        7: {"key": [1, 2, {3}]},
    }


@HALF
@pytest.mark.parametrize("asynchronous", [True, False])
def test_all_kinds_of_values_come_back_sharing_what_they_shared(asynchronous: bool) -> None:
    state = kinds_of_values()
    with DefaultStager(CheckpointStagerConfig(use_async_staging=asynchronous)) as stager:
        for _ in range(2):
            staged = staged_in(stager, state)
            assert_equal(staged, state)
            # Their own memory, which is written through as the original's would be.
            staged["tied"][0][0] = 17
            assert staged["tied"][1][0] == staged["not contiguous"][0][0, 0] == staged["required"][0] == 17
            assert state["tied"][0][0] == 0


@HALF
@settings(max_examples=100)
@given(state=states())
def test_any_state_comes_back_and_makes_the_file_of_a_synchronous_save(state: Any) -> None:
    with warnings.catch_warnings(), synchronous() as stager:
        warnings.simplefilter("ignore", UnsafeValueWarning)
        try:
            expected = file_of_synchronous_save(state)
        except UnsupportedStateError:
            with pytest.raises(UnsupportedStateError):
                stager.stage(state)
            return
        for _ in range(2):
            snapshot = stager.snapshot(state)
            assert file_of_snapshot(snapshot) == expected
            snapshot.release()
        assert_equal(stager.stage(state), state)


def test_values_of_any_class_come_back() -> None:
    large = torch.rand(ELEMENTS)
    state = {"note": Note("kept", large), "tied": large}
    for stager in (DefaultStager(), synchronous()):
        with stager:
            with pytest.warns(UnsafeValueWarning, match="note"):
                staged = staged_in(stager, state)
            assert type(staged["note"]) is Note
            assert staged["note"].text == "kept"
            assert torch.equal(staged["tied"], large)
            staged["tied"][0] = 5
            assert staged["note"].tensor[0] == 5


@HALF
def test_a_writer_of_the_users_own_gets_every_kind_of_value(tmp_path: Path) -> None:
    state = {**kinds_of_values(), "note": Note("kept", torch.ones(3))}
    state["views"].pop()  # torch.save, which the writer calls, cannot do memory of two types
    config = CheckpointerConfig(process_config=CheckpointProcessConfig(nice=0))
    checkpointer = make_async_checkpointer(config, checkpoint_writer_init_fn=in_child.PathFirst)
    try:
        with pytest.warns(UnsafeValueWarning, match="note"):
            _, written = checkpointer.save(str(tmp_path), state, epoch=3)
        written.result(PATIENCE_SECS)
    finally:
        checkpointer.close()
    saved = torch.load(tmp_path / "custom.pt", weights_only=False)
    assert saved["kwargs"] == {"epoch": 3}
    torch.save(state, tmp_path / "expected.pt")
    found, expected = saved["state"], torch.load(tmp_path / "expected.pt", weights_only=False)
    note = found.pop("note")
    assert (type(note), note.text) == (Note, "kept")
    assert torch.equal(note.tensor, torch.ones(3))
    del expected["note"]
    assert_equal(found, expected)


def test_what_cannot_be_staged_says_so_at_once_and_stops_nobody() -> None:
    for stager in (DefaultStager(), synchronous()):
        with stager:
            with pytest.raises(UnsupportedStateError, match="bad"):
                stager.stage({"bad": torch.empty(3, device="meta")})
            assert_equal(staged_in(stager, {"a": torch.ones(3)}), {"a": torch.ones(3)})


# It stays what it was


@pytest.mark.parametrize("asynchronous", [True, False])
def test_hazard_12_results_of_many_stagings_stay_what_they_were(asynchronous: bool, rng_seed: int) -> None:
    generator = torch.Generator().manual_seed(rng_seed)
    with DefaultStager(CheckpointStagerConfig(use_async_staging=asynchronous)) as stager:
        state = {"large": torch.rand(ELEMENTS, generator=generator), "small": torch.rand(9, generator=generator)}
        results, expected = [], []
        for number in range(6):
            state["number"] = number
            results.append(stager.stage(state))
            expected.append(copy.deepcopy(state))
            if isinstance(results[-1], Future):
                results[-1].exception(PATIENCE_SECS)
            for name in ("large", "small"):
                state[name].uniform_(generator=generator)
        for result, wanted in zip(results, expected, strict=True):
            assert_equal(result.result() if isinstance(result, Future) else result, wanted)


def test_hazard_12_a_future_outlives_its_stager() -> None:
    state = state_of_large_tensors(1)
    stager = DefaultStager()
    future = stager.stage(state)
    stager.close()
    assert isinstance(future, Future)
    assert_equal(future.result(PATIENCE_SECS), state)


def test_hazard_12_a_snapshot_being_written_is_never_overwritten(rng_seed: int) -> None:
    with synchronous() as stager:
        first = state_of_large_tensors(rng_seed)
        snapshot = stager.snapshot(first)
        others = [stager.snapshot(state_of_large_tensors(rng_seed + number)) for number in (1, 2)]
        stager.stage(state_of_large_tensors(rng_seed + 3))
        for number, held in enumerate([snapshot, *others]):
            assert file_of_snapshot(held) == file_of_synchronous_save(state_of_large_tensors(rng_seed + number))
        snapshot.release()
        stager.stage(state_of_large_tensors(rng_seed + 4))
        for number, held in enumerate(others, 1):
            assert file_of_snapshot(held) == file_of_synchronous_save(state_of_large_tensors(rng_seed + number))
            held.release()


def test_hazard_12_a_save_staged_while_another_is_written_changes_neither(tmp_path: Path, rng_seed: int) -> None:
    config = CheckpointerConfig(
        staging_config=CheckpointStagerConfig(snapshots_in_flight=2), process_config=CheckpointProcessConfig(nice=0)
    )
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            config, checkpoint_writer_init_fn=in_child.StateFirst, checkpoint_writer_init_args={"pipe": theirs}
        )
        try:
            writes = []
            for number in (1, 2):
                state = state_of_large_tensors(rng_seed + number)
                staged, written = checkpointer.save(str(tmp_path / str(number)), state)
                staged.result(PATIENCE_SECS)
                state["model"]["weights"].zero_()
                writes.append(written)
                if number == 1:
                    assert receive(ours) == ("writing", str(tmp_path / "1"))
            ours.send("go on")
            assert receive(ours) == ("writing", str(tmp_path / "2"))
            ours.send("go on")
            for written in writes:
                written.result(PATIENCE_SECS)
        finally:
            checkpointer.close()
    for number in (1, 2):
        saved = torch.load(tmp_path / str(number) / "custom.pt", weights_only=True)
        assert_equal(saved["state"], state_of_large_tensors(rng_seed + number))


# Life and death of a stager


def test_a_closed_stager_takes_nothing_more() -> None:
    stager = DefaultStager()
    with stager as entered:
        assert entered is stager
        assert isinstance(entered, CheckpointStager)
        staged_in(stager, {"a": torch.ones(3)})
    stager.close()
    for call in (stager.stage, stager.prewarm, stager.snapshot):
        with pytest.raises(ConfigError, match="closed"):
            call({"a": torch.ones(3)})


def test_closing_waits_for_what_is_being_staged(gate: Gate) -> None:
    stager = DefaultStager()
    gate.shut()
    state = state_of_large_tensors(1)
    future = stager.stage(state)
    closing = threading.Thread(target=stager.close)
    closing.start()
    gate.wait_until_reached()
    assert closing.is_alive()
    gate.open()
    closing.join(PATIENCE_SECS)
    assert not closing.is_alive()
    assert isinstance(future, Future)
    assert_equal(future.result(0), state)


def test_several_threads_may_stage(rng_seed: int) -> None:
    with DefaultStager() as stager:
        results: dict[int, Any] = {}

        def stage(number: int) -> None:
            results[number] = [staged_in(stager, state_of_large_tensors(rng_seed + number)) for _ in range(5)]

        threads = [threading.Thread(target=stage, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECS)
    for number in range(4):
        for result in results[number]:
            assert_equal(result, state_of_large_tensors(rng_seed + number))


def test_hazard_17_the_default_configuration_works_on_this_machine() -> None:
    config = CheckpointStagerConfig()
    assert config.use_non_blocking_copy is torch.accelerator.is_available()
    assert config.use_pinned_memory is torch.cuda.is_available()
    with DefaultStager(config) as stager:
        assert_equal(staged_in(stager, {"a": torch.ones(3)}), {"a": torch.ones(3)})


def test_hazard_17_pinned_memory_without_cuda_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with DefaultStager(CheckpointStagerConfig(use_pinned_memory=True, use_non_blocking_copy=False)) as stager:
        assert_equal(staged_in(stager, {"a": torch.ones(3)}), {"a": torch.ones(3)})


def test_hazard_17_non_blocking_copies_without_an_accelerator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="use_non_blocking_copy") as caught:
        DefaultStager(CheckpointStagerConfig(use_non_blocking_copy=True))
    assert isinstance(caught.value, ConfigError)


# Hazard 18: no step can fail without being heard of


class BeesError(Exception):
    """Nothing in lastgood raises or catches it."""


def raise_bees(*arguments: Any, **options: Any) -> Any:
    raise BeesError


def fail_large_copies(patch: pytest.MonkeyPatch) -> None:
    real = job_module.copy_memory
    patch.setattr(
        job_module, "copy_memory", lambda to, start, size: raise_bees() if size >= LARGE else real(to, start, size)
    )


def fail_last_piece(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(job_module._Progress, "finish", raise_bees)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "prepare": lambda patch: patch.setattr(job_module, "arena_size", raise_bees),
    "memory": lambda patch: patch.setattr(staging.ArenaPool, "make", raise_bees),
    "lay_out": lambda patch: patch.setattr(job_module, "lay_out", raise_bees),
    "lay_down": lambda patch: patch.setattr(job_module, "lay_down", raise_bees),
    "copy": fail_large_copies,
    "check": lambda patch: patch.setattr(Witnesses, "check", raise_bees),
    "last": fail_last_piece,
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_hazard_18_a_failure_of_any_step_fails_both_futures(
    tmp_path: Path, checkpointer: AsyncCheckpointer, rng_seed: int, failure: str, is_first: bool
) -> None:
    path = str(tmp_path / "a")
    state = {**state_of_large_tensors(rng_seed), "test": [failure, is_first]}
    if not is_first:
        checkpointer.save(path, state)[1].result(PATIENCE_SECS)
        if failure == "lay_down":
            state["step"] = "another length"  # or nothing is laid down again
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        FAILURES[failure](patch)
        staged, written = checkpointer.save(path, state)
        for future in (staged, written):
            assert isinstance(future.exception(PATIENCE_SECS), BeesError)
    assert contents(tmp_path) == before
    for number in range(2):
        state["step"] = number
        checkpointer.save(path, state)[1].result(PATIENCE_SECS)
        assert_equal(checkpointer.load(path), state)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_hazard_18_a_failure_of_any_step_fails_the_call_of_stage(
    rng_seed: int, failure: str, asynchronous: bool
) -> None:
    state = state_of_large_tensors(rng_seed)
    with DefaultStager(CheckpointStagerConfig(use_async_staging=asynchronous)) as stager:
        with pytest.MonkeyPatch.context() as patch:
            FAILURES[failure](patch)
            if asynchronous:
                future = stager.stage(state)
                assert isinstance(future, Future)
                with pytest.raises(BeesError):
                    future.result(PATIENCE_SECS)
                assert isinstance(future.exception(), BeesError)
                del future
            else:
                with pytest.raises(BeesError):
                    stager.stage(state)
        for _ in range(2):
            assert_equal(staged_in(stager, state), state)
    gc.collect()


def test_hazard_18_a_failure_before_the_call_returns_is_raised_by_it(
    checkpointer: AsyncCheckpointer, tmp_path: Path
) -> None:
    state = {"small": torch.ones(5), "mark": "before the call returns"}
    checkpointer.save(str(tmp_path), state)[1].result(PATIENCE_SECS)
    before = arenas_open()
    with noted_events() as events:
        for _ in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job_module, "copy_memory", raise_bees)
                with pytest.raises(BeesError):
                    checkpointer.save(str(tmp_path), state)
        checkpointer.save(str(tmp_path), state)[1].result(PATIENCE_SECS)
    assert arenas_open() == before
    assert "reserve" not in {event.phase for event in events}, "the arena was given back, and is used again"
    assert_equal(checkpointer.load(str(tmp_path)), state)


def test_hazard_18_whoever_cannot_be_told_of_a_snapshot_gets_none() -> None:
    with DefaultStager() as stager:
        with pytest.raises(BeesError):
            stager.stage_for({"a": torch.ones(ELEMENTS)}, raise_bees)
        assert stager.current is None
        assert_equal(staged_in(stager, {"a": torch.ones(3)}), {"a": torch.ones(3)})


def state_with_numbers(number: int) -> dict[str, Any]:
    """Those of 256 to 65,535 make pickles of one size, and indexes of different ones."""
    return {"numbers": [number] * 5000, "small": torch.full((100,), float(number))}


def stage_when_memory_is_short_and_again() -> None:
    stager = synchronous()
    assert_equal(stager.stage(state_with_numbers(300)), state_with_numbers(300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_module, "available_memory", lambda: 0)
        with pytest.raises(ArenaMemoryError):
            stager.stage(state_with_numbers(50_000))
    for number in (300, 60_000):
        assert_equal(stager.stage(state_with_numbers(number)), state_with_numbers(number))
    stager.close()


def test_after_memory_was_short_for_a_known_state_staging_goes_on(worker: Worker) -> None:
    worker.call(stage_when_memory_is_short_and_again)


# Threads that were given up


def stage_while_an_old_copy_hangs(close: bool) -> list[bool]:
    """Whether staging and the file are right while a copy that was given up hangs, and when it has gone on."""
    stager = DefaultStager(CheckpointStagerConfig(staging_timeout_secs=0.2))
    states = [state_of_large_tensors(number) for number in (1, 2)]
    with gate_before_copies() as gate:
        before = set(threading.enumerate())
        gate.shut()
        future = stager.stage(states[0])
        assert isinstance(future, Future)
        assert isinstance(future.exception(PATIENCE_SECS), StagingError)
        hanging = [
            thread for thread in set(threading.enumerate()) - before if thread.name.startswith("lastgood-stage-")
        ]
        assert len(hanging) == 2
        del future
        gc.collect()
        if close:
            stager.close()
        else:
            gate.let_others_pass()
            held, attached = stager.stage_for(states[1], lambda staged: staged.snapshot)
            assert held.exception(PATIENCE_SECS) is None
        gate.open()
        for thread in hanging:
            thread.join(PATIENCE_SECS)
            assert not thread.is_alive()
        if close:
            return []
        right = file_of_snapshot(attached) == file_of_synchronous_save(states[1])
        stager.close()
        return [right]


def test_promise_8_a_copy_that_was_given_up_writes_into_no_later_snapshot(worker: Worker) -> None:
    assert worker.call(stage_while_an_old_copy_hangs, False) == [True]


def test_promise_8_a_copy_that_was_given_up_does_not_crash_the_trainer_when_it_goes_on(worker: Worker) -> None:
    worker.call(stage_while_an_old_copy_hangs, True)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


# Getting ready


def test_after_prewarming_the_first_save_touches_no_new_memory(tmp_path: Path, rng_seed: int) -> None:
    checkpointer = make_async_checkpointer()
    try:
        stager = checkpointer._checkpoint_stager
        assert isinstance(stager, DefaultStager)
        state = state_of_large_tensors(rng_seed)
        with noted_events() as events:
            checkpointer.prewarm(state).result(PATIENCE_SECS)
        assert [event.phase for event in events if event.phase in ("prewarm", "reserve")] == ["reserve", "prewarm"]
        (ready,) = stager._pool._free
        number, size, arenas = ready.number, ready.size, arenas_open()
        for name, tensor in state["model"].items():
            state["model"][name] = tensor + 1
        placements = []
        real = Snapshot.observe

        def observe(self: Snapshot, observer: Any) -> None:
            self.placed.add_done_callback(lambda placed: placements.append(placed.result()))
            real(self, observer)

        with noted_events() as events, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Snapshot, "observe", observe)
            checkpointer.save(str(tmp_path), state)[1].result(PATIENCE_SECS)
        assert [(placement.arena, placement.arena_size) for placement in placements] == [(number, size)]
        assert "reserve" not in {event.phase for event in events}
        assert arenas_open() == arenas
        assert_equal(checkpointer.load(str(tmp_path)), state)
    finally:
        checkpointer.close()


def test_prewarming_that_fails_says_so_in_its_future(monkeypatch: pytest.MonkeyPatch) -> None:
    with DefaultStager() as stager:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arena_module, "available_memory", lambda: 1 << 20)
            with pytest.raises(ArenaMemoryError):
                stager.prewarm(state_of_large_tensors(1)).result(PATIENCE_SECS)
        with pytest.raises(UnsupportedStateError, match="bad"):
            stager.prewarm({"bad": torch.empty(3, device="meta")}).result(PATIENCE_SECS)
        gc.collect()
        before = arenas_open()
        stager.prewarm(state_of_large_tensors(1)).result(PATIENCE_SECS)
        assert arenas_open() == before + 1
        assert_equal(staged_in(stager, state_of_large_tensors(2)), state_of_large_tensors(2))


def test_prewarming_changes_nothing_of_a_save_that_waits_behind_it() -> None:
    with DefaultStager() as stager:
        staged_in(stager, {"step": 1, "tensor": torch.ones(3)})
        busy = threading.Event()
        stager._run_later(lambda: busy.wait(PATIENCE_SECS))
        warm = stager.prewarm({"step": 2, "tensor": torch.ones(3)})
        future = stager.stage({"step": 3, "tensor": torch.ones(3)})
        busy.set()
        assert isinstance(future, Future)
        assert future.result(PATIENCE_SECS)["step"] == 3
        warm.result(PATIENCE_SECS)
        assert staged_in(stager, {"step": 4, "tensor": torch.ones(3)})["step"] == 4


def test_prewarming_a_checkpointer_with_a_stager_of_the_users_own_is_done_at_once() -> None:
    class Own(CheckpointStager):
        def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            return copy.deepcopy(state_dict)

        def close(self) -> None:
            pass

    checkpointer = make_async_checkpointer()
    checkpointer._checkpoint_stager.close()
    checkpointer._checkpoint_stager = Own()
    try:
        assert checkpointer.prewarm({}).result(0) is None
    finally:
        checkpointer.close()


def test_staging_leaves_the_users_random_numbers_alone() -> None:
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)
    with DefaultStager() as stager:
        staged_in(stager, state_of_large_tensors(1))
    assert (random.random(), torch.rand(1)) == expected


# What must not leave a stager, or its users, in a state that nothing gets out of


def test_a_staging_thread_that_cannot_be_started_fails_that_save_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "lastgood-staging":
            raise RuntimeError("can't start new thread")
        real(thread)

    with DefaultStager() as stager:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                stager.stage({"a": torch.ones(4)})
        assert stager.current is None
        staged = stager.stage({"a": torch.ones(4)})
        assert isinstance(staged, Future)
        assert torch.equal(staged.result(PATIENCE_SECS)["a"], torch.ones(4))


def test_a_snapshot_is_staged_although_the_interpreter_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    stager = DefaultStager()
    monkeypatch.setattr(threading.Thread, "start", start)
    staged = stager.stage({"a": torch.ones(100_000)})
    assert isinstance(staged, Future)
    assert torch.equal(staged.result(0)["a"], torch.ones(100_000))
    stager.close()


def test_an_interrupted_take_leaves_no_half_exchanged_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interruption(BaseException):
        pass

    def interrupt(*arguments: Any) -> None:
        raise Interruption

    stager = DefaultStager(CheckpointStagerConfig(use_async_staging=False))
    stager.stage({"a": torch.ones(4), "step": 1})
    with monkeypatch.context() as patch:
        patch.setattr("lastgood._staging.plan.Plan.exchange", interrupt)
        with pytest.raises(Interruption):
            stager.stage({"a": torch.ones(4), "step": 2})
    assert stager.stage({"a": torch.ones(4), "step": 2})["step"] == 2  # type: ignore[index]
    stager.close()
