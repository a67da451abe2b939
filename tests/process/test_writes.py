"""What is written, from what, in which order, and what is said when it fails."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.interruptions import interrupt_starts
from tests.helpers.saves import assert_state, read, state_of, temporaries
from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child
from tests.process.processes import held, new_process, pid_of, pipe, receive, started

from lastgood import _events
from lastgood.checkpoint_process import CheckpointProcess
from lastgood.errors import CheckpointProcessError, ConfigError, SaveTimeoutError, StorageError, TornSnapshotError
from lastgood.staging import DefaultStager


def test_a_dict_is_written_as_it_was_at_the_call(tmp_path: Path) -> None:
    state = state_of(1)
    with started() as process:
        future = process.write(state, str(tmp_path / "a"))
        state["model"]["weights"].zero_()
        assert future.result(PATIENCE_SECS) is None
    assert_state(read(tmp_path / "a"), 1)


def test_a_staged_future_is_written_from_its_own_memory(tmp_path: Path) -> None:
    with DefaultStager() as stager, started() as process:
        for number in range(3):
            future = stager.stage(state_of(number))
            process.write(future, str(tmp_path / str(number))).result(PATIENCE_SECS)  # type: ignore[arg-type]
    for number in range(3):
        assert_state(read(tmp_path / str(number)), number)


def test_a_save_whose_waiting_was_kept_from_starting_ends_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending: Future[dict[str, Any]] = Future()
    with started(no_progress_timeout_secs=20, close_timeout_secs=PATIENCE_SECS) as process:
        with monkeypatch.context() as patch:
            threads = interrupt_starts(patch, "lastgood-await-state")
            with pytest.raises(KeyboardInterrupt):
                process.write(pending, str(tmp_path / "a"))
        process.write(state_of(2), str(tmp_path / "a")).result(PATIENCE_SECS)
        # Nobody has its future: what comes after all is not saved.
        pending.set_result(state_of(1))
        for thread in threads:
            thread.join(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 2)


def test_a_foreign_future_of_a_state_dict_is_waited_for(tmp_path: Path) -> None:
    pending: Future[dict[str, Any]] = Future()
    with started() as process:
        written = process.write(pending, str(tmp_path / "a"))
        pending.set_result(state_of(1))
        written.result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 1)


def test_hazard_18_a_staging_that_failed_fails_the_save(tmp_path: Path) -> None:
    pending: Future[dict[str, Any]] = Future()
    with started() as process:
        written = process.write(pending, str(tmp_path / "a"))
        pending.set_exception(KeyError("lost"))
        with pytest.raises(KeyError, match="lost"):
            written.result(PATIENCE_SECS)
        with pytest.raises(TypeError):
            process.write({"a": threading.Lock()}, str(tmp_path / "b")).result(PATIENCE_SECS)
        process.write(state_of(1), str(tmp_path / "c")).result(PATIENCE_SECS)
    assert os.listdir(tmp_path) == ["c"]


def test_a_state_dict_that_never_comes_times_out(tmp_path: Path) -> None:
    never: Future[dict[str, Any]] = Future()
    with started(no_progress_timeout_secs=0.3) as process, pytest.raises(SaveTimeoutError, match="did not come"):
        process.write(never, str(tmp_path / "a")).result(PATIENCE_SECS)


def test_writing_begins_before_staging_is_over_and_publishes_nothing_of_a_torn_snapshot(tmp_path: Path) -> None:
    torn = TornSnapshotError("model.weights has changed", tensor="model.weights")
    with pipe() as (ours, theirs), started(in_child.noting_writer, noting(theirs)) as process, held(state_of(1)) as one:
        receive(ours)
        future = process.write(one.snapshot, str(tmp_path / "a"))
        one.place().advance(4096)
        one.fail(torn)
        with pytest.raises(TornSnapshotError) as caught:
            future.result(PATIENCE_SECS)
        assert caught.value is torn
        assert one.given_back == [True]
        assert not ours.poll()
    assert not (tmp_path / "a").exists() or os.listdir(tmp_path / "a") == []


def noting(theirs: Any) -> dict[str, Any]:
    from lastgood.checkpoint_writer import CheckpointWriterConfig

    return {"pipe": theirs, "config": CheckpointWriterConfig()}


def test_a_snapshot_that_could_not_be_placed_fails_its_save_and_holds_up_no_other(tmp_path: Path) -> None:
    with started() as process, held(state_of(1)) as one:
        future = process.write(one.snapshot, str(tmp_path / "a"))
        after = process.write(state_of_process(process), str(tmp_path / "b"))
        assert not after.done()
        one.snapshot.placed.set_exception(MemoryError("none left"))
        with pytest.raises(MemoryError):
            future.result(PATIENCE_SECS)
        after.result(PATIENCE_SECS)
        one.fail(MemoryError("none left"))
        assert one.given_back == [True]


def state_of_process(process: CheckpointProcess) -> "Future[dict[str, Any]]":
    """A state that is there already, but whose write does not wait for being sent."""
    ready: Future[dict[str, Any]] = Future()
    ready.set_result(state_of(2))
    return ready


def test_hazard_12_a_queue_of_two_snapshots_lands_in_order_each_with_its_own_state(tmp_path: Path) -> None:
    """Both go to the same path; neither is touched while the other is being written."""
    path = tmp_path / "a"
    with (
        pipe() as (ours, theirs),
        started(in_child.gated_writer, {"pipe": theirs}) as process,
        held(state_of(1)) as first,
        held(state_of(2)) as second,
    ):
        futures = []
        for snapshot in (first, second):
            snapshot.place().complete()
            futures.append(process.write(snapshot.snapshot, str(path)))
        for future, snapshot, number in zip(futures, (first, second), (1, 2), strict=True):
            assert receive(ours)[0] == "pre_commit"
            assert snapshot.given_back == []
            ours.send("go")
            assert receive(ours)[0] == "post_commit"
            assert_state(read(path), number)
            ours.send("go")
            future.result(PATIENCE_SECS)
            assert snapshot.given_back == [True]


def test_saves_land_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    """Although the first one's state comes last."""
    path = tmp_path / "a"
    pending: Future[dict[str, Any]] = Future()
    with started() as process, held(state_of(2)) as second:
        first_future = process.write(pending, str(path))
        second_future = process.write(second.snapshot, str(path))
        second.place()
        pending.set_result(state_of(1))
        first_future.result(PATIENCE_SECS)
        assert_state(read(path), 1)
        second.complete()
        second_future.result(PATIENCE_SECS)
    assert_state(read(path), 2)


def test_paths_and_arguments_reach_the_writer_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means what it meant in the trainer when it asked, though both have moved since."""
    with pipe() as (ours, theirs), started(in_child.noting_writer, noting(theirs)) as process:
        receive(ours)
        kept = {"large": "x" * 3_000_000}
        for name in ("one", "two"):
            directory = tmp_path / name
            directory.mkdir()
            monkeypatch.chdir(directory)
            future = process.write(state_of(1), "relative/path", mutable=kept)
            monkeypatch.chdir(tmp_path)
            assert receive(ours) == ("pre_commit", "relative/path", {"mutable": kept})
            assert receive(ours)[:2] == ("post_commit", "relative/path")
            future.result(PATIENCE_SECS)
            assert_state(read(directory / "relative" / "path"), 1)


def test_an_argument_that_cannot_travel_fails_its_save_alone(tmp_path: Path) -> None:
    with started() as process, held(state_of(1)) as one:
        future = process.write(one.snapshot, str(tmp_path / "a"), function=lambda: None)
        one.place().complete()
        with pytest.raises(ConfigError, match="cannot be passed"):
            future.result(PATIENCE_SECS)
        assert one.given_back == [True]
        with pytest.raises(ConfigError, match="cannot be passed"):
            process.write(state_of(1), str(tmp_path / "a"), function=lambda: None).result(PATIENCE_SECS)
        process.write(state_of(1), str(tmp_path / "b")).result(PATIENCE_SECS)


@pytest.mark.parametrize("writer", [in_child.StateFirst, in_child.PathFirst])
def test_a_writer_of_the_users_own_gets_a_state_dict_in_either_order(tmp_path: Path, writer: Any) -> None:
    with started(writer) as process:
        process.write(state_of(1), str(tmp_path / "a"), step=3).result(PATIENCE_SECS)
        assert process.ping()["torch_is_imported"] is True
    found = torch.load(tmp_path / "a" / "custom.pt")
    assert_state(found["state"], 1)
    assert found["kwargs"] == {"step": 3}


def test_a_writer_that_goes_on_in_the_background_is_waited_for(tmp_path: Path) -> None:
    with started(in_child.StateFirst, {"in_background": True}) as process:
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)


def test_tensors_that_were_shared_stay_the_same_memory_and_others_do_not(tmp_path: Path) -> None:
    state = {
        "shared": {"weights": torch.zeros(10).share_memory_()},
        "listed": [1, torch.zeros(3).share_memory_()],
        "private": torch.zeros(10),
    }
    with started(in_child.ChangesTensors) as process:
        for times in (1, 2):
            process.write(state, str(tmp_path / "a")).result(PATIENCE_SECS)
            assert torch.equal(state["shared"]["weights"], torch.full((10,), float(times)))  # type: ignore[index, call-overload]
            assert torch.equal(state["listed"][1], torch.full((3,), float(times)))  # type: ignore[index]
            assert torch.equal(state["private"], torch.zeros(10))  # type: ignore[arg-type]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_hazard_10_thousands_of_tensors_cost_no_descriptors(tmp_path: Path) -> None:
    state = {str(number): torch.full((16,), float(number)) for number in range(3000)}
    with started() as process:
        process.write(state, str(tmp_path / "a")).result(PATIENCE_SECS)
        here, there = descriptors(os.getpid()), descriptors(pid_of(process))
        for _ in range(20):
            process.write(state, str(tmp_path / "a")).result(PATIENCE_SECS)
        assert (descriptors(os.getpid()), descriptors(pid_of(process))) == (here, there)
        assert there < 20
    found = read(tmp_path / "a")
    assert torch.equal(found["2999"], state["2999"])


def test_the_arenas_descriptor_is_sent_once_and_again_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lastgood._process.pipe import MessagePipe

    sent: list[int] = []
    real = MessagePipe.queue

    def queue(self: MessagePipe, message: Any, descriptors: Any = (), sent_: Any = None) -> None:
        if message.payload.get("event") == "begin":
            sent.append(len(descriptors))
        real(self, message, descriptors, sent_)

    monkeypatch.setattr(MessagePipe, "queue", queue)
    with DefaultStager() as stager, started() as process:
        for number, elements in enumerate((50_000, 50_000, 500_000, 500_000)):
            future = stager.stage(state_of(number, elements))
            process.write(future, str(tmp_path / "a")).result(PATIENCE_SECS)  # type: ignore[arg-type]
            del future
            assert_state(read(tmp_path / "a"), number, elements)
    assert sent == [1, 0, 1, 0]


def test_an_arena_that_is_gone_is_let_go_of(tmp_path: Path) -> None:
    def mapped(process: CheckpointProcess) -> int:
        return Path(f"/proc/{pid_of(process)}/maps").read_text().count("lastgood-arena")

    with started() as process, held(state_of(1)) as one:
        one.place().complete()
        process.write(one.snapshot, str(tmp_path / "a")).result(PATIENCE_SECS)
        arena = one.snapshot.placed.result().arena
        process.ping()
        assert mapped(process) == 1
        process.forget_arenas(arena)
        process.ping()
        assert mapped(process) == 0
        assert process.write(one.snapshot, str(tmp_path / "b")).exception(PATIENCE_SECS) is None


def test_hazard_01_the_process_lives_on_after_a_failed_write(tmp_path: Path) -> None:
    with pipe() as (ours, theirs), started(in_child.gated_writer, {"pipe": theirs}) as process:
        pid = pid_of(process)
        failed = process.write(state_of(1), str(tmp_path / "a"))
        assert receive(ours)[0] == "pre_commit"
        ours.send("fail")
        with pytest.raises(StorageError, match="full of bees") as caught:
            failed.result(PATIENCE_SECS)
        assert (caught.value.errno, caught.value.rank, caught.value.phase) == (28, 3, "write")
        (note,) = caught.value.__notes__
        assert f"In the checkpoint process {pid}" in note
        assert "in pre_commit" in note
        good = process.write(state_of(2), str(tmp_path / "a"))
        for _ in range(2):
            receive(ours)
            ours.send("go")
        good.result(PATIENCE_SECS)
        assert pid_of(process) == pid
    assert_state(read(tmp_path / "a"), 2)
    assert temporaries(tmp_path / "a") == []


def test_an_error_that_cannot_travel_comes_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pipe() as (ours, theirs), started(in_child.gated_writer, {"pipe": theirs}) as process:
        future = process.write(state_of(1), str(tmp_path / "a"))
        receive(ours)
        ours.send("fail untyped")
        with pytest.raises(CheckpointProcessError, match="nobody else knows this class") as caught:
            future.result(PATIENCE_SECS)
        assert caught.value.path == str(tmp_path / "a")
        assert caught.value.pid == pid_of(process)


def test_what_the_process_prints_is_in_the_trainers_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pipe() as (ours, theirs), started(in_child.gated_writer, {"pipe": theirs}) as process:
        future = process.write(state_of(1), str(tmp_path / "a"))
        for order in ("say", "go"):
            receive(ours)
            ours.send(order)
        future.result(PATIENCE_SECS)
    assert "a word from the hook" in caplog.text


def test_phases_of_the_write_are_published_in_the_trainer(tmp_path: Path) -> None:
    events: list[_events.Event] = []
    unsubscribe = _events.subscribe(events.append)
    try:
        with started() as process:
            process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    finally:
        unsubscribe()
    assert {"save", "write", "fsync", "commit"} <= {event.phase for event in events if str(tmp_path) in event.path}


def test_a_write_asked_for_before_the_process_is_ready_is_not_lost(tmp_path: Path) -> None:
    process = new_process()
    future = process.write(state_of(1), str(tmp_path / "a"))
    future.result(PATIENCE_SECS)
    process.close()
    assert_state(read(tmp_path / "a"), 1)


def test_a_callback_of_a_save_may_ask_for_the_next_one(tmp_path: Path) -> None:
    again: Future[Any] = Future()
    with started() as process:
        first = process.write(state_of(1), str(tmp_path / "a"))
        first.add_done_callback(lambda _: again.set_result(process.write(state_of(2), str(tmp_path / "b"))))
        again.result(PATIENCE_SECS).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "b"), 2)
