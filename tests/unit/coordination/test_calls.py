"""What ranks find out without talking, and what a trainer does about a save that failed before anybody heard of it."""

import pickle
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.workers import PATIENCE_SECS
from tests.unit.coordination.ranks_here import Ranks, coordinations, join_telling_threads

from lastgood._coordination import calls, connection, failures, together
from lastgood._coordination.calls import SaveCall, SaveCalls
from lastgood._coordination.connection import Connection, StoreUnreachableError, serve
from lastgood._coordination.failures import give_up_in, is_decided_in
from lastgood._coordination.meeting import ALL_CAME, Meeting, Outcome
from lastgood._coordination.together import Coordinator
from lastgood._coordination.trainer import TrainerVotes
from lastgood.errors import BarrierTimeoutError, CheckpointProcessError
from lastgood.format.epoch import Epoch
from lastgood.storage.local import LocalStorage


def asking(world_size: int) -> list[SaveCalls]:
    """The ranks of one checkpointer."""
    known = coordinations(world_size)
    known[0].close()
    return [SaveCalls(each) for each in known]


def test_all_ranks_find_the_same_ids_and_no_two_saves_have_the_same() -> None:
    ranks = asking(3)
    [others] = asking(1)
    found: set[str] = set()
    for path in ("/run/step-1", "/run/step-2", "/run/step-1", "/run/step-1"):
        ids = {each.new(path).save_id for each in ranks}
        assert len(ids) == 1
        assert len(ids.pop()) == 32
        found.update(each.new(path).save_id for each in ranks)
        found.add(others.new(path).save_id)
    assert len(found) == 8


def test_a_save_that_one_rank_has_not_asked_for_does_not_put_it_out_of_step() -> None:
    first, second = asking(2)
    first.new("/run/step-1")
    assert first.new("/run/step-2").save_id == second.new("/run/step-2").save_id


def test_paths_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_PATHS_REMEMBERED", 3)
    [asked] = asking(1)
    for step in range(10):
        asked.new(f"/run/step-{step}")
    assert len(asked._counts) == 3


def test_a_call_survives_the_way_to_the_checkpoint_process() -> None:
    call = SaveCall("a" * 32, Epoch(3, "job"), ("b" * 32,), (("c" * 32, "rank 1 gave up: it was killed"),))
    assert pickle.loads(pickle.dumps(call)) == call


def test_what_could_not_be_told_is_taken_along_until_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FAILURES_REMEMBERED", 2)
    [asked] = asking(1)
    lost = [asked.new("/run/step-1") for _ in range(3)]
    for call in lost:
        asked.could_not_tell(call, "killed")
    after = asked.new("/run/step-2")
    assert after.failed == tuple((call.save_id, "killed") for call in lost[1:])
    assert asked.new("/run/step-3").failed == after.failed
    asked.went_well(after)
    assert asked.new("/run/step-4").failed == ()


# Connections


def test_a_store_that_nobody_serves_any_more_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECS", 0.3)
    [first] = coordinations(1)
    assert first.listener is not None
    with first.listener:
        client = Connection(first.host, first.port, served_here=False)
        with pytest.raises(StoreUnreachableError, match=f"the store at {first.host}:{first.port}"):
            client.open(0.3)
        with pytest.raises(StoreUnreachableError, match="there is no connection"):
            client.call(lambda store: store.num_keys(), 1)
        # Those who knock before it is served are let in when it is.
        opened = start(client.open, PATIENCE_SECS)
        server = serve(first.listener, first.world_size)
        opened.result(PATIENCE_SECS)
        client.open(PATIENCE_SECS)
        with pytest.raises(StoreUnreachableError, match="broke"):
            client.call(lambda store: store.get("nothing"), PATIENCE_SECS)
        assert not client.is_open
        client.open(PATIENCE_SECS)
        over = threading.Event()
        with pytest.raises(StoreUnreachableError, match=r"did not answer within 0\.1 s"):
            client.call(lambda _: over.wait(), 0.1)
        over.set()
        client.open(PATIENCE_SECS)
        del server
        with pytest.raises(StoreUnreachableError, match="broke"):
            client.call(lambda store: store.num_keys(), PATIENCE_SECS)
    client.close()


# The trainer's votes


def test_a_trainer_whose_save_failed_before_its_process_knew_of_it_ends_it_for_all(tmp_path: Path) -> None:
    ranks = Ranks(3)
    votes = TrainerVotes(ranks.coordinations[1], LocalStorage(), 60)
    path = tmp_path / "step-1"
    saves = ranks.start(path, 1, [0, 2])
    call = votes.new_call(path)
    assert votes.with_epoch(call, path) is call  # only rank 0 takes it
    votes.give_up(call, MemoryError("no room for the snapshot"))
    for error in finished(saves):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)
        assert "rank 1 gave up: MemoryError: no room for the snapshot" in str(error)
    ranks.close()


def test_a_write_that_failed_is_told_unless_its_process_has_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException] = []
    first, second = coordinations(2)
    first.close()
    votes = TrainerVotes(second, LocalStorage(), 60)
    monkeypatch.setattr(votes, "give_up", lambda _, error: told.append(error))
    died = RuntimeError("Child process terminated unexpectedly")
    for error in (None, BarrierTimeoutError("rank 0 gave up"), died):
        written: Future[None] = Future()
        votes.watch(votes.new_call("/run/step-1"), written)
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
    assert told == [died]


def test_news_of_a_failure_that_nobody_could_be_told_come_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's checkpoint process has died, and the store with it; the others are waiting for a new one."""
    for module in (connection, failures):
        monkeypatch.setattr(module, "ANSWER_SECS", 0.2)
    ranks = Ranks(2)
    first = ranks.coordinations[0]
    coordinator = ranks.writers[0]._coordinator
    assert coordinator is not None
    coordinator._server = None
    votes = TrainerVotes(first, LocalStorage(), 60)
    lost = votes.new_call(tmp_path / "step-1")
    votes.give_up(lost, CheckpointProcessError("its process was killed"))
    waiting = ranks.start(tmp_path / "step-1", 1, [1])  # for the store
    after = votes.new_call(tmp_path / "step-2")
    assert [save_id for save_id, _ in after.failed] == [lost.save_id]
    renewed = Coordinator(first, 600)
    after = votes.with_epoch(after, tmp_path / "step-2")
    renewed.save(after, str(tmp_path / "step-2"), LocalStorage()).begin()
    [error] = finished(waiting)
    assert isinstance(error, BarrierTimeoutError)
    assert "rank 0 gave up: CheckpointProcessError: its process was killed" in str(error)
    assert after.epoch is not None
    renewed._server = None
    ranks.close()


def test_a_failure_that_a_checkpoint_process_could_not_tell_goes_with_the_next_call_of_its_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody serves the store at this moment."""
    for module in (connection, failures, together):
        monkeypatch.setattr(module, "ANSWER_SECS", 0.2)
    first, second = coordinations(2)
    assert first.listener is not None
    asked, coordinator = SaveCalls(second), Coordinator(second, PATIENCE_SECS)
    lost = asked.new("/run/step-1")
    coordinator.save(lost, "/run/step-1", LocalStorage()).give_up(ValueError("this rank's hook says no"))
    join_telling_threads()
    for module in (connection, failures, together):
        monkeypatch.setattr(module, "ANSWER_SECS", PATIENCE_SECS)
    server = serve(first.listener, first.world_size)
    coordinator.save(asked.new("/run/step-2"), "/run/step-2", LocalStorage())._open()
    store = dist.TCPStore(first.host, first.port, is_master=False, wait_for_workers=False)
    told = Meeting(store, f"save/{lost.save_id}", 0, 2).outcome()
    assert told == Outcome("rank 1 gave up: ValueError: this rank's hook says no", (1,))
    after = asked.new("/run/step-3")
    assert coordinator.save(after, "/run/step-3", LocalStorage())._call == after  # nothing is told twice
    coordinator.close()
    del server
    first.close()


def test_the_first_decision_stands() -> None:
    [first] = coordinations(1)
    assert first.listener is not None
    server = serve(first.listener, first.world_size)
    client = Connection(first.host, first.port, served_here=True)
    client.open(PATIENCE_SECS)
    assert not client.call(lambda store: is_decided_in(store, "x"), 1)
    client.call(lambda store: give_up_in(store, "x", Outcome("the disk is full", (1,))), 1)
    client.call(lambda store: Meeting(store, "save/x", 0, 1).decide(ALL_CAME), 1)
    assert client.call(lambda store: Meeting(store, "save/x", 0, 1).outcome(), 1) == Outcome("the disk is full", (1,))
    assert client.call(lambda store: is_decided_in(store, "x"), 1)
    client.close()
    del server
    first.close()
