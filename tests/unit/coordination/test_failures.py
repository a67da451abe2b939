"""How the others hear of a save that has failed on one rank: from its trainer, later, or with the next save."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.workers import PATIENCE_SECS
from tests.unit.coordination.ranks_here import Ranks, coordinations, impatient, join_telling_threads, outcome_in

from lastgood._coordination import failures
from lastgood._coordination.calls import Coordination, SaveCall, SaveCalls
from lastgood._coordination.connection import serve
from lastgood._coordination.departures import departed_of
from lastgood._coordination.failures import FailedSaves, tell_in
from lastgood._coordination.meeting import ALL_CAME, Meeting, Outcome
from lastgood._coordination.together import Coordinator
from lastgood._coordination.trainer import TrainerVotes
from lastgood.errors import BarrierTimeoutError, CheckpointProcessError
from lastgood.storage.local import LocalStorage

KILLED = Outcome("rank 1 gave up: it was killed", (1,))


@pytest.fixture
def three() -> Iterator[list[Coordination]]:
    """Ranks whose store nobody serves yet."""
    made = coordinations(3)
    yield made
    made[0].close()


def store_of(ranks: list[Coordination]) -> Any:
    return dist.TCPStore(ranks[0].host, ranks[0].port, is_master=False, wait_for_workers=False)


def served(ranks: list[Coordination]) -> Any:
    assert ranks[0].listener is not None
    return serve(ranks[0].listener, len(ranks))


def has(store: Any, call: SaveCall, what: str) -> bool:
    return bool(store.check([f"save/{call.save_id}/{what}"]))


def votes_of(rank: Coordination, timeout_secs: float = 60) -> TrainerVotes:
    return TrainerVotes(rank, LocalStorage(), no_progress_timeout_secs=60, write_barrier_timeout_secs=timeout_secs)


# What is known


def test_what_has_failed_is_taken_along_until_it_has_arrived(
    three: list[Coordination], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_FAILURES_REMEMBERED", 2)
    asked, failed = SaveCalls(three[1]), FailedSaves(three[1], 60)
    calls = [asked.new("/run/step-1") for _ in range(3)]
    for call in calls:
        failed.note(call, KILLED)
    after = failed.with_news(asked.new("/run/step-2"))
    assert after.failed == tuple((call.save_id, KILLED.reason) for call in calls[1:])
    elsewhere = SaveCall("a" * 32, failed=(("b" * 32, "its hook says no"),))
    assert failed.with_news(elsewhere).failed == elsewhere.failed + after.failed
    waits = asked.new("/run/step-3")
    assert failed.with_news(waits).failed == after.failed
    failed.arrived(after)
    assert failed.with_news(waits) is waits  # though it was asked for when they had not arrived


# What a store is told


def test_who_fails_first_is_heard_once_and_the_first_outcome_stands(three: list[Coordination]) -> None:
    server, calls = served(three), SaveCalls(three[0])
    store = store_of(three)
    call, hooked = calls.new("/run/step-1"), Outcome("rank 2 gave up: its hook says no", (2,))
    tell_in(store, three[1], call.save_id, KILLED)
    tell_in(store, three[1], call.save_id, KILLED)
    assert not has(store, call, "all heard")
    tell_in(store, three[2], call.save_id, hooked)
    assert outcome_in(store, call) == KILLED
    assert store.get(f"save/{call.save_id}/opened") == b"given up"

    # Rank 0 itself is none that it waits for. What it says is what the others wait for, once all have voted.
    call = calls.new("/run/step-2")
    tell_in(store, three[0], call.save_id, Outcome("rank 0 gave up: it was killed", (0,)))
    assert not has(store, call, "heard")
    assert has(store, call, "result")

    call = calls.new("/run/step-3")
    Meeting(store, f"save/{call.save_id}", 1, 3).decide(ALL_CAME)
    tell_in(store, three[1], call.save_id, KILLED)
    assert outcome_in(store, call) == ALL_CAME
    assert not has(store, call, "heard")
    assert not has(store, call, "result")
    tell_in(store, three[0], call.save_id, Outcome("rank 0 gave up: its disk is full", (0,)))
    assert outcome_in(store, call) == ALL_CAME
    tell_in(store, three[0], call.save_id, Outcome("rank 0 gave up: it was killed", (0,)))
    assert b"its disk is full" in store.get(f"save/{call.save_id}/result")
    del server


# Later, in the background


def test_the_others_are_told_for_as_long_as_they_may_wait(three: list[Coordination]) -> None:
    """Rank 0's next process may take long to start, and serves the store then."""
    failed, call = FailedSaves(three[1], PATIENCE_SECS), SaveCalls(three[1]).new("/run/step-1")
    with impatient():
        failed.tell(call, KILLED)
        failed._tellers[0].join(1)
    assert failed._tellers[0].is_alive()
    server = served(three)
    join_telling_threads()
    store = store_of(three)
    assert outcome_in(store, call) == KILLED
    assert int(store.add(f"save/{call.save_id}/heard", 0)) == 1
    del server


def test_what_a_later_save_has_told_is_not_told_again(three: list[Coordination]) -> None:
    """All have voted since, and nothing of the save that failed is left in the store."""
    failed, calls = FailedSaves(three[1], PATIENCE_SECS), SaveCalls(three[1])
    call = calls.new("/run/step-1")
    failed.tell(call, KILLED)
    failed.arrived(failed.with_news(calls.new("/run/step-2")))
    server = served(three)
    join_telling_threads()
    store = store_of(three)
    assert not any(has(store, call, what) for what in ("outcome", "account", "decided", "opened", "heard"))
    del server


def test_without_a_thread_the_news_are_taken_along(three: list[Coordination], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    failed, calls = FailedSaves(three[1], 60), SaveCalls(three[1])
    call = calls.new("/run/step-1")
    for start_daemon in (no_thread, lambda *_, **__: None):
        monkeypatch.setattr(failures, "start_daemon", start_daemon)
        failed.tell(call, KILLED)
        failed.close()
    assert failed.with_news(calls.new("/run/step-2")).failed == ((call.save_id, KILLED.reason),)


@pytest.mark.parametrize("who", ["checkpoint process", "checkpoint process without a trainer", "trainer"])
def test_a_rank_that_has_something_to_tell_does_not_leave_before_it_is_told(
    three: list[Coordination], who: str
) -> None:
    """The last save of a training, of which rank 0's process has not known before it died."""
    if who == "trainer":
        votes = votes_of(three[1], PATIENCE_SECS)
        call, leave = votes.new_call("/run/step-1"), votes.close
        votes.give_up(call, ValueError("the connection broke"))
    else:
        coordinator, call = Coordinator(three[1], PATIENCE_SECS), SaveCalls(three[1]).new("/run/step-1")
        leave = coordinator.close if who == "checkpoint process" else coordinator.depart
        save = coordinator.save(call, "/run/step-1", LocalStorage())
        save._exchange.is_cut_off = True
        save.give_up(ValueError("the connection broke"))
    leaving = start(leave)
    with pytest.raises(TimeoutError):
        leaving.result(0.5)
    server = served(three)
    leaving.result(PATIENCE_SECS)
    store = store_of(three)
    assert "rank 1 gave up: ValueError: the connection broke" in str(outcome_in(store, call).reason)
    assert (departed_of(store, [1]) == (1,)) == (who == "checkpoint process without a trainer")
    del server


def test_a_store_that_is_lost_again_is_looked_for_again(
    three: list[Coordination], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def break_once(store: Any, coordination: Coordination, save_id: str, outcome: Outcome) -> None:
        told.append(save_id)
        if len(told) == 1:
            raise dist.DistError("Connection reset by peer")
        tell_in(store, coordination, save_id, outcome)

    monkeypatch.setattr(failures, "tell_in", break_once)
    server, failed, call = served(three), FailedSaves(three[1], PATIENCE_SECS), SaveCalls(three[1]).new("/run/step-1")
    failed.tell(call, KILLED)
    join_telling_threads()
    assert told == [call.save_id] * 2
    assert outcome_in(store_of(three), call) == KILLED
    del server


# When a save is interrupted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_is_interrupted_in_the_middle_of_a_call_to_the_store_is_told_at_once(
    three: list[Coordination], rank: int
) -> None:
    """Rank 0 after all have voted: then the others wait for what it says."""

    def interrupt(store: Any) -> None:
        if rank == 0:
            Meeting(store, f"save/{call.save_id}", 0, 3).decide(ALL_CAME)
        raise KeyboardInterrupt

    server = served(three) if rank else None
    coordinator, call = Coordinator(three[rank], PATIENCE_SECS), SaveCalls(three[rank]).new("/run/step-1")
    save = coordinator.save(call, "/run/step-1", LocalStorage())
    save._open(PATIENCE_SECS)
    with pytest.raises(KeyboardInterrupt):
        save._exchange.ask(interrupt)
    save.give_up(KeyboardInterrupt())
    store = store_of(three)
    if rank == 0:
        assert outcome_in(store, call) == ALL_CAME
        result = Outcome.decode(store.get(f"save/{call.save_id}/result"))
    else:
        result = outcome_in(store, call)
    assert result == Outcome(f"rank {rank} gave up: KeyboardInterrupt: ", (rank,))
    assert not coordinator._failures._tellers
    coordinator._last = None  # nobody else is there to hear of it
    coordinator.close()
    del server


# With the next save


@pytest.mark.parametrize("next_save", ["waits for rank 0", "fails"])
def test_what_could_not_be_told_comes_with_the_next_save(three: list[Coordination], next_save: str) -> None:
    """The trainer makes the calls, and its checkpoint process finds that nobody serves the store."""
    asked, coordinator = SaveCalls(three[1]), Coordinator(three[1], 0.2)
    lost = asked.new("/run/step-1")
    with impatient():
        coordinator.save(lost, "/run/step-1", LocalStorage()).give_up(ValueError("this rank's hook says no"))
        join_telling_threads()
    server = served(three)
    after = asked.new("/run/step-2")
    save = coordinator.save(after, "/run/step-2", LocalStorage())
    if next_save == "fails":
        save.give_up(ValueError("and again"))
    else:
        save._open(PATIENCE_SECS)
    store = store_of(three)
    assert outcome_in(store, lost) == Outcome("rank 1 gave up: ValueError: this rank's hook says no", (1,))
    later = coordinator.save(asked.new("/run/step-3"), "/run/step-3", LocalStorage())._call
    # What was told here would be lost with this store before all have heard.
    assert [save_id for save_id, _ in later.failed] == ([after.save_id] if next_save == "fails" else [])
    assert later.save_id not in coordinator._former
    assert lost.save_id in coordinator._former
    coordinator.close()
    del server


def test_what_was_told_to_a_store_that_is_gone_is_told_to_the_next_one(three: list[Coordination]) -> None:
    asked, coordinator, server = SaveCalls(three[1]), Coordinator(three[1], PATIENCE_SECS), served(three)
    lost = asked.new("/run/step-1")
    coordinator.save(lost, "/run/step-1", LocalStorage()).give_up(ValueError("this rank's hook says no"))
    assert "hook says no" in str(outcome_in(store_of(three), lost).reason)
    del server
    server = served(three)
    coordinator.save(asked.new("/run/step-2"), "/run/step-2", LocalStorage())._open(PATIENCE_SECS)
    assert "hook says no" in str(outcome_in(store_of(three), lost).reason)
    coordinator.close()
    del server


# The trainer's votes


def test_a_trainer_whose_save_failed_before_its_process_knew_of_it_ends_it_for_all(tmp_path: Path) -> None:
    ranks = Ranks(3)
    votes = votes_of(ranks.coordinations[1])
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


def test_a_write_that_failed_is_told_unless_its_process_has_told_it(
    three: list[Coordination], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[BaseException] = []
    votes = votes_of(three[1])
    monkeypatch.setattr(votes, "give_up", lambda _, error: told.append(error))
    died = RuntimeError("Child process terminated unexpectedly")
    calls = []
    for error in (None, BarrierTimeoutError("rank 0 gave up"), died):
        written: Future[None] = Future()
        calls.append(votes.new_call("/run/step-1"))
        votes.watch(calls[-1], written)
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
    assert told == [died]
    # The process may be gone, with what it knows, when the next save comes.
    after = votes.with_epoch(votes.new_call("/run/step-2"), "/run/step-2")
    assert after.failed == ((calls[1].save_id, "rank 1 gave up: BarrierTimeoutError: rank 0 gave up"),)
    written = Future()
    votes.watch(after, written)
    written.set_result(None)
    assert votes.with_epoch(votes.new_call("/run/step-3"), "/run/step-3").failed == ()


def test_news_of_a_failure_that_nobody_could_be_told_come_with_the_next_save(tmp_path: Path) -> None:
    """Rank 0's checkpoint process has died, and the store with it; the others are waiting for a new one."""
    ranks = Ranks(2)
    first, path = ranks.coordinations[0], tmp_path / "step-2"
    ranks.end_store()
    votes = votes_of(first, 0.2)
    lost = votes.new_call(tmp_path / "step-1")
    with impatient():
        votes.give_up(lost, CheckpointProcessError("its process was killed"))
        join_telling_threads()
    waiting = ranks.start(tmp_path / "step-1", 1, [1])  # for the store
    after = votes.with_epoch(votes.new_call(path), path)
    assert [save_id for save_id, _ in after.failed] == [lost.save_id]
    assert after.epoch is not None
    renewed = Coordinator(first, 600)
    renewed.save(after, str(path), LocalStorage()).begin()
    [error] = finished(waiting)
    assert isinstance(error, BarrierTimeoutError)
    assert "rank 0 gave up: CheckpointProcessError: its process was killed" in str(error)
    renewed._server = None
    ranks.close()
