"""What a training loop sees of the manager: saves when due, failures as asked, notices, figures, and an orderly end."""

import contextlib
import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import PATIENCE_SECS

import lastgood
from lastgood import CheckpointManager, KeepLast, SaveRecord
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.errors import ConfigError, SaveTimeoutError, StorageError, UnsupportedStateError
from lastgood.storage.local import LocalStorage


def state_of(seed: int) -> dict[str, Any]:
    return {"weights": torch.full((1000,), float(seed)), "step": seed}


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextlib.contextmanager
def obstructed(root: Path, step: int) -> Iterator[None]:
    """Saves of ``step`` fail: a file stands where its directory would."""
    place = root / f"step-{step}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    try:
        yield
    finally:
        place.unlink()


def log_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "lastgood.jsonl").read_text().splitlines()]


def test_it_saves_every_so_many_steps_and_restores_the_newest(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous, every_steps=3) as manager:
        assert manager.restore(state_of(0)) is None
        assert manager.latest() is None
        saved = [step for step in range(1, 8) if manager.save_if_due(step, state_of(step))]
        assert saved == [3, 6]
        manager.wait()
        assert (manager.steps(), manager.latest()) == ([3, 6], 6)
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager:
        state = state_of(0)
        weights = state["weights"]
        assert manager.restore(state) == 6
        assert state["weights"] is weights
        assert torch.equal(weights, state_of(6)["weights"])
        assert state["step"] == 6
        assert manager.restore(state, step=3) == 3
        assert state["step"] == 3


def test_a_save_is_of_the_moment_of_the_call_and_its_future_means_durable(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager:
        state = state_of(1)
        saved = manager.save(1, state)
        with manager.hold():
            state["weights"].zero_()
            state["step"] = 9
        assert saved.result(PATIENCE_SECS) is None
        loaded = torch.load(tmp_path / "step-1" / "checkpoint_0.pt", weights_only=True)
        assert torch.equal(loaded["weights"], state_of(1)["weights"])
        assert loaded["step"] == 1


def test_asking_whether_a_save_is_due_does_not_change_the_answer(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, asynchronous=False, every_steps=2, overhead=0.5) as manager:
        assert manager.is_due(1)  # By overhead, the first look of all: so that the cost becomes known.
        assert manager.is_due(1)
        assert manager.save_if_due(1, state_of(1))
        assert manager.steps() == [1]


def test_without_anything_that_says_when_nothing_is_ever_due(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        assert not any(manager.save_if_due(step, state_of(step)) for step in range(5))


def test_a_failed_save_is_logged_counted_and_lets_the_training_go_on(
    tmp_path: Path, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[SaveRecord] = []
    with CheckpointManager(tmp_path, asynchronous=asynchronous, on_save=records.append) as manager:
        with obstructed(tmp_path, 2), caplog.at_level(logging.WARNING, "lastgood"):
            manager.save(1, state_of(1))
            failed = manager.save(2, state_of(2))
            assert isinstance(failed.exception(PATIENCE_SECS), StorageError)
        manager.save(3, state_of(3))
        manager.wait()
        assert manager.steps() == [1, 3]
    assert [(record.step, record.outcome, record.failures_in_a_row) for record in records] == [
        (1, "durable", 0),
        (2, "failed", 1),
        (3, "durable", 0),
    ]
    assert "the save of step 2 failed" in caplog.text
    logged = [record for record in log_of(tmp_path) if record["kind"] == "save"]
    assert [(record["step"], record["outcome"]) for record in logged] == [(1, "durable"), (2, "failed"), (3, "durable")]
    assert "step-2" in logged[1]["error"]


def test_three_failures_in_a_row_are_raised(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager, contextlib.ExitStack() as obstacles:
        for step in (1, 2, 3):
            obstacles.enter_context(obstructed(tmp_path, step))

        def fail_three_times() -> None:
            for step in (1, 2, 3):
                manager.save(step, state_of(step)).exception(PATIENCE_SECS)
            manager.save_if_due(4, state_of(4))  # Asynchronous, the next call says so.

        with pytest.raises(StorageError, match="step-3"):
            fail_three_times()
        manager.save(4, state_of(4))
        manager.wait()
        assert manager.latest() == 4


def test_asked_to_raise_the_first_failure_is_raised_by_the_next_call(tmp_path: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(tmp_path, asynchronous=asynchronous, on_failure="raise")

    def fail() -> None:
        manager.save(1, state_of(1)).exception(PATIENCE_SECS)
        manager.wait()

    with obstructed(tmp_path, 1), pytest.raises(StorageError, match="step-1"):
        fail()
    manager.save(2, state_of(2))
    manager.close()
    assert torch.load(tmp_path / "step-2" / "checkpoint_0.pt", weights_only=True)["step"] == 2


def test_a_last_save_that_failed_is_raised_by_close_and_only_once(tmp_path: Path, asynchronous: bool) -> None:
    manager = CheckpointManager(tmp_path, asynchronous=asynchronous)
    with obstructed(tmp_path, 1):
        manager.save(1, state_of(1)).exception(PATIENCE_SECS)
        with pytest.raises(StorageError, match="step-1"):
            manager.close()
        manager.close()


def test_a_failure_of_an_earlier_save_does_not_cost_the_one_that_is_asked_for(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with obstructed(tmp_path, 1):
            lock = LocalStorage().try_lock(str(tmp_path / "elsewhere" / "x"))
            assert lock is not None
            lock.release()
            manager.save(1, state_of(1))
            # It waits for the one before, which fails, and is done all the same.
            assert manager.save(2, state_of(2)).result(PATIENCE_SECS) is None
        assert manager.steps() == [2]


def test_what_cannot_be_saved_at_all_is_raised_at_once(tmp_path: Path, asynchronous: bool) -> None:
    class Unpicklable:
        def __reduce__(self) -> str:
            raise TypeError("not this one")

    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager:
        with pytest.raises(UnsupportedStateError, match="handle"):
            manager.save(1, {"handle": Unpicklable()})
        manager.save(2, state_of(2))


def test_an_error_of_the_users_own_object_goes_through(tmp_path: Path) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise ZeroDivisionError

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        with pytest.raises(ZeroDivisionError):
            manager.save(1, {"broken": Broken()})
        manager.save(2, state_of(2))
        assert manager.steps() == [2]


@pytest.mark.parametrize(
    ("step", "metrics"),
    [
        (-1, None),
        (True, None),
        (1.0, None),
        (10**18, None),
        (1, {"loss": torch.tensor(1.0)}),
        (1, {2: 1.0}),
        (1, [1.0]),
        (1, {f"metric {number}": 1.0 for number in range(500)}),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_happens(
    tmp_path: Path, step: Any, metrics: Any
) -> None:
    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        with pytest.raises(ConfigError):
            manager.save(step, state_of(1), metrics)
        assert manager.steps() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_steps": 0},
        {"overhead": 1.5},
        {"keep": [3]},
        {"on_failure": "ignore"},
        {"every_secs": -1.0},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CheckpointManager(tmp_path, asynchronous=False, **arguments)


def test_the_state_has_to_be_a_dict_and_one_of_its_names_is_taken(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        for state in (torch.nn.Linear(2, 2), [1], {"random_states": 1}):
            with pytest.raises(ConfigError):
                manager.save(1, state)  # type: ignore[arg-type]
            with pytest.raises(ConfigError):
                manager.restore(state)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        CheckpointManager("")


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, asynchronous=False)
    manager.close()
    manager.close()
    for call in (
        lambda: manager.save(1, state_of(1)),
        lambda: manager.restore(state_of(1)),
        lambda: manager.set_aside(1),
    ):
        with pytest.raises(ConfigError, match="closed"):
            call()
    assert manager.steps() == []


def test_metrics_and_time_are_kept_with_the_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager:
        manager.save(5, state_of(5), {"loss": 0.25, "accuracy": 1, "broken": float("inf")})
    [record] = [record for record in log_of(tmp_path) if record["kind"] == "save"]
    assert record["metrics"] == {"loss": 0.25, "accuracy": 1.0, "broken": None}
    from lastgood.manager.catalog import read_catalog

    [entry] = read_catalog(LocalStorage(), str(tmp_path)).committed
    assert entry.metrics == record["metrics"]
    assert entry.saved_at == pytest.approx(record["time"], abs=60.0)


def test_every_phase_is_an_event_and_a_record_has_the_times_of_all(tmp_path: Path) -> None:
    events: list[lastgood.Event] = []
    records: list[SaveRecord] = []
    unsubscribe = lastgood.subscribe(events.append)
    try:
        with CheckpointManager(tmp_path, on_save=records.append, keep=KeepLast(1)) as manager:
            manager.restore(state_of(0))
            manager.save(1, state_of(1))
    finally:
        unsubscribe()
    path = str(tmp_path / "step-1")
    of_save = [event.phase for event in events if event.path.startswith(path)]
    assert {"stall", "staged", "write", "fsync", "commit", "durable"} <= set(of_save)
    assert {"restore", "retention"} <= {event.phase for event in events if event.path == str(tmp_path)}
    [record] = records
    assert {"stall", "write", "fsync", "commit"} <= set(record.phases)
    assert record.nbytes == (tmp_path / "step-1" / "checkpoint_0.pt").stat().st_size
    assert record.staged_secs is not None
    assert record.durable_secs is not None
    assert 0 <= record.stall_secs <= record.durable_secs


def test_a_callback_that_raises_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on_save(record: SaveRecord) -> None:
        raise ZeroDivisionError

    with CheckpointManager(tmp_path, asynchronous=False, on_save=on_save, keep=KeepLast(1)) as manager:
        for step in (1, 2):
            manager.save(step, state_of(step))
        manager.wait()
        assert manager.steps() == [2]
    assert "something that follows a save failed" in caplog.text


def test_a_notice_makes_the_next_step_save_and_the_loop_end(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous, every_steps=1000) as manager:
        steps = 0
        for step in range(1, 100):
            steps = step
            if step == 7:
                os.kill(os.getpid(), signal.SIGUSR1)
            manager.save_if_due(step, state_of(step))
            if manager.preempted:
                assert manager.save_before_exit(step, state_of(step), deadline_secs=PATIENCE_SECS)
                break
        assert steps == 7
        assert manager.steps() == [7]
        assert not manager.save_if_due(8, state_of(8))  # Once is enough, if the training goes on all the same.


def test_a_last_save_is_made_when_none_is_under_way(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, every_steps=2) as manager:
        manager.save_if_due(2, state_of(2))
        assert not manager.preempted
        assert manager.save_before_exit(3, state_of(3))
        assert manager.steps() == [2, 3]


def test_a_last_save_does_not_wait_beyond_its_deadline(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        lock = LocalStorage().try_lock(str(tmp_path / "step-1" / "checkpoint_0.pt"))
        assert lock is not None
        try:
            assert not manager.save_before_exit(1, state_of(1), deadline_secs=0.01)
            # The one before is in the way of another, which is not begun.
            assert not manager.save_before_exit(2, state_of(2), deadline_secs=0.01)
            with pytest.raises(SaveTimeoutError, match="step-1"):
                manager.wait(0.01)
        finally:
            lock.release()
        manager.wait()
        assert manager.steps() == [1]


def test_a_last_save_that_fails_is_raised(tmp_path: Path, asynchronous: bool) -> None:
    with (
        CheckpointManager(tmp_path, asynchronous=asynchronous) as manager,
        obstructed(tmp_path, 1),
        pytest.raises(StorageError, match="step-1"),
    ):
        manager.save_before_exit(1, state_of(1))


def test_handlers_of_signals_are_as_before_when_it_is_closed(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with CheckpointManager(tmp_path, asynchronous=False):
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_ends_the_block_is_not_hidden_by_a_save_that_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train() -> None:
        with CheckpointManager(tmp_path, asynchronous=False) as manager:
            manager.save(1, state_of(1))
            raise KeyError("mine")

    with obstructed(tmp_path, 1), pytest.raises(KeyError, match="mine"):
        train()
    assert "closing the manager after an error failed, too" in caplog.text


def test_the_first_look_gets_memory_ready_for_the_first_save(tmp_path: Path) -> None:
    events: list[lastgood.Event] = []
    prewarmed = threading.Event()

    def note(event: lastgood.Event) -> None:
        events.append(event)
        if event.phase == "prewarm":
            prewarmed.set()

    unsubscribe = lastgood.subscribe(note)
    try:
        with CheckpointManager(tmp_path, every_steps=10) as manager:
            assert isinstance(manager._checkpointer, AsyncCheckpointer)
            for step in (1, 2):
                manager.save_if_due(step, state_of(step))
            assert prewarmed.wait(PATIENCE_SECS)
    finally:
        unsubscribe()
    assert [event.phase for event in events].count("prewarm") == 1


def test_what_would_go_is_said_without_doing_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, asynchronous=False) as manager:
        for step in range(5):
            manager.save(step, state_of(step))
    with CheckpointManager(tmp_path, asynchronous=False, keep=[KeepLast(1), lastgood.KeepSteps([2])]) as manager:
        planned = manager.prune(dry_run=True)
        assert [verdict.entry.step for verdict in planned.removed] == [0, 1, 3]
        assert all(verdict.reasons for verdict in (*planned.removed, *planned.decision.keep))
        assert manager.steps() == [0, 1, 2, 3, 4]
        done = manager.prune()
        assert done.removed == planned.removed
        assert manager.steps() == [2, 4]


def test_a_last_save_waits_for_saves_and_not_for_what_follows_them(tmp_path: Path) -> None:
    gate = threading.Event()
    with CheckpointManager(tmp_path, on_save=lambda record: gate.wait(PATIENCE_SECS) and None) as manager:
        manager.save(1, state_of(1))
        assert manager.save_before_exit(2, state_of(2))
        assert not gate.is_set()
        assert manager.steps() == [1, 2]
        gate.set()


def test_a_last_save_is_tried_whatever_failed_before(tmp_path: Path, asynchronous: bool) -> None:
    with CheckpointManager(tmp_path, asynchronous=asynchronous) as manager:
        for step in (1, 2):
            with obstructed(tmp_path, step):
                manager.save(step, state_of(step)).exception(PATIENCE_SECS)
        with obstructed(tmp_path, 3), contextlib.suppress(StorageError):
            manager.save(3, state_of(3)).exception(PATIENCE_SECS)
        assert manager.save_before_exit(4, state_of(4))
        assert manager.steps() == [4]


def test_where_nobody_has_the_manager_any_more_its_signals_end_the_process_again(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    manager = CheckpointManager(tmp_path, asynchronous=False)
    assert signal.getsignal(signal.SIGUSR1) != before
    del manager
    gc.collect()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_one_of_several_processes_without_a_group_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="init_process_group"):
        CheckpointManager(tmp_path)
    CheckpointManager(tmp_path, asynchronous=False, rank_info=lastgood.RankInfo(0, 1)).close()


def test_a_manager_that_has_nothing_to_tell_leaves_nothing_on_disk(tmp_path: Path) -> None:
    CheckpointManager(tmp_path / "run", asynchronous=False).close()
    assert not (tmp_path / "run").exists()


def test_the_stall_of_a_save_counts_from_the_call_and_so_does_all_else(tmp_path: Path, asynchronous: bool) -> None:
    asked: list[float] = []

    class Slow:
        def state_dict(self) -> dict[str, Any]:
            began = time.perf_counter()
            while time.perf_counter() < began + 0.02:
                pass
            asked.append(time.perf_counter() - began)
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    records: list[SaveRecord] = []
    with CheckpointManager(tmp_path, asynchronous=asynchronous, on_save=records.append) as manager:
        manager.save(1, {"slow": Slow(), **state_of(1)})
    [record] = records
    assert record.durable_secs is not None
    assert record.stall_secs >= asked[0]
    assert record.durable_secs >= asked[0]
