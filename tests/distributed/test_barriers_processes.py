"""Barriers among ranks that die: some ranks are processes of their own, the others threads of the test's process.

All processes are forked from one server that has imported torch already.
"""

import multiprocessing
import os
import signal

import pytest
import torch.distributed as dist
from tests.distributed.barrier_ranks import (
    HOST,
    PATIENCE_SECS,
    finished,
    make_dist_barrier,
    meet,
    reserved_port,
    serve_rank,
    start,
    store_arguments,
)

from lastgood import barriers
from lastgood.barriers import TCPStoreBarrier
from lastgood.errors import BarrierTimeoutError


class RankProcess:
    """A rank in its own process, which executes its barrier when told to."""

    def __init__(self, context, make_barrier, arguments):
        self._commands, theirs = context.Pipe()
        self._process = context.Process(target=serve_rank, args=(theirs, make_barrier, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self):
        assert self._commands.poll(PATIENCE_SECS), "the rank's process does not answer"
        return self._commands.recv()

    def start_meeting(self):
        self._commands.send("meet")

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def exit_code(self):
        self._process.join(PATIENCE_SECS)
        return self._process.exitcode

    def kill(self):
        self._process.kill()
        self._process.join()
        self._commands.close()


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "lastgood.barriers"])
    return context


@pytest.fixture
def start_process(context):
    started = []

    def start_one(make_barrier, arguments):
        started.append(RankProcess(context, make_barrier, arguments))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()


@pytest.fixture
def port():
    with reserved_port() as port:
        yield port


def with_one_process(start_process, port, process_rank, **changed):
    """Three ranks with a barrier: one is a process, two are threads here. All have met once."""
    process = start_process(TCPStoreBarrier, store_arguments(process_rank, 3, port, **changed))
    others = [rank for rank in range(3) if rank != process_rank]
    makings = [start(lambda rank=rank: TCPStoreBarrier(**store_arguments(rank, 3, port, **changed))) for rank in others]
    here = [making.result(timeout=PATIENCE_SECS) for making in makings]
    assert process.answer() == "ready"
    process.start_meeting()
    assert meet(here) == [None, None]
    assert process.answer() == "met"
    return process, here


def wait_until_they_wait(port, ranks):
    """Until these ranks have come to their second barrier, seen from outside."""
    watcher = dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    watcher.wait([f"lastgood/save/1/came/{rank}" for rank in ranks])


def test_hazard_26_a_rank_killed_before_it_comes_is_named_in_time(start_process, port):
    process, here = with_one_process(start_process, port, process_rank=1, timeout_secs=1)
    process.send_signal(signal.SIGKILL)
    assert process.exit_code() == -signal.SIGKILL
    for error in meet(here):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)
        assert "waited 1 s for rank 1" in str(error)


def test_when_rank_0_is_killed_the_others_fail_at_once(start_process, port):
    process, here = with_one_process(start_process, port, process_rank=0, timeout_secs=600)
    waiting = [start(barrier.execute_barrier) for barrier in here]
    wait_until_they_wait(port, (1, 2))
    process.send_signal(signal.SIGKILL)
    for error in finished(waiting):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (0,)
        assert f"the store at {HOST}:{port}, which rank 0 keeps, broke" in str(error)
        # What torch throws brings the stack of its C++ code along.
        assert "\n" not in str(error)
    # It stays gone, and says so every time.
    assert all(isinstance(error, BarrierTimeoutError) for error in meet(here))


def test_hazard_27_a_stopped_rank_0_does_not_hold_the_others_for_ever(start_process, port, monkeypatch):
    monkeypatch.setattr(barriers, "_ANSWER_SECS", 0.5)
    process, here = with_one_process(start_process, port, process_rank=0, timeout_secs=0.5)
    process.send_signal(signal.SIGSTOP)
    for error in meet(here):
        assert isinstance(error, BarrierTimeoutError)
        assert f"the store at {HOST}:{port}, which rank 0 keeps, did not let it through within 0.5 s" in str(error)


def test_a_rank_that_waits_can_be_interrupted(start_process, port):
    process, here = with_one_process(start_process, port, process_rank=1, timeout_secs=600)
    process.start_meeting()
    here[0]._store.wait(["lastgood/save/1/came/1"])
    process.send_signal(signal.SIGINT)
    assert process.answer() == "interrupted"
    assert process.exit_code() == 0


def test_dist_barrier_meets_and_reports_a_rank_that_died(start_process, tmp_path):
    rendezvous = str(tmp_path / "rendezvous")
    ranks = [
        start_process(make_dist_barrier, {"rank": rank, "world_size": 2, "rendezvous": rendezvous}) for rank in (0, 1)
    ]
    assert [rank.answer() for rank in ranks] == ["ready", "ready"]
    for _ in range(2):
        for rank in ranks:
            rank.start_meeting()
        assert [rank.answer() for rank in ranks] == ["met", "met"]
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[1].exit_code() == -signal.SIGKILL
    ranks[0].start_meeting()
    error = ranks[0].answer()
    assert isinstance(error, BarrierTimeoutError)
    assert error.rank == 0
    assert "Rank 0 could not meet the other ranks of the process group" in str(error)
