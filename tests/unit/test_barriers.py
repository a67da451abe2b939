"""Barriers among ranks that are threads here, over real stores on the loopback interface.

tests/distributed/test_barriers_processes.py has the ranks that die.
"""

import socket
import threading
import time
from datetime import timedelta
from unittest.mock import MagicMock, call

import pytest
import torch.distributed as dist
from tests.distributed.barrier_ranks import (
    HOST,
    finished,
    make_together,
    meet,
    reserved_port,
    start,
    store_arguments,
)

from lastgood import barriers
from lastgood.barriers import (
    Barrier,
    BarrierConfig,
    DistBarrier,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)
from lastgood.errors import BarrierTimeoutError, ConfigError


@pytest.fixture
def port():
    with reserved_port() as port:
        yield port


@pytest.fixture
def impatient(monkeypatch):
    """A store that does not answer is given up half a second after the time-out, not five seconds."""
    monkeypatch.setattr(barriers, "_ANSWER_SECS", 0.5)


@pytest.fixture(params=[True, False], ids=["libuv", "older-backend"])
def three_ranks(request, port):
    return make_together(
        [store_arguments(rank, 3, port, use_checkpoint_barrier_tcpstore_libuv=request.param) for rank in range(3)]
    )


def make_three(port, timeouts):
    return make_together([store_arguments(rank, 3, port, timeout_secs=secs) for rank, secs in enumerate(timeouts)])


# Configuration


def test_no_type_means_no_barrier():
    assert create_barrier_from_config(BarrierConfig()) is None


def test_configurations_do_not_share_their_arguments():
    first, second = BarrierConfig(), BarrierConfig()
    first.barrier_args["timeout_secs"] = 1
    assert second.barrier_args == {}


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown barrier type: mpi\. .*dist_barrier.*tcp_store") as caught:
        create_barrier_from_config(BarrierConfig("mpi"))
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"timeout": 5}, "timeout"), ({}, "global_rank"), ({"global_rank": 0, "global_world_size": 1}, "barrier_prefix")],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ConfigError, match=rf"'tcp_store'.*'{named}'.*takes: global_rank, global_world_size"):
        create_barrier_from_config(BarrierConfig("tcp_store", arguments))


def test_dist_barrier_takes_no_arguments():
    with pytest.raises(ConfigError, match=r"'timeout_secs'.*takes: none"):
        create_barrier_from_config(BarrierConfig("dist_barrier", {"timeout_secs": 5}))


def test_a_registered_barrier_is_made_from_its_configuration(monkeypatch):
    monkeypatch.setattr(barriers, "BARRIER_REGISTRY", dict(barriers.BARRIER_REGISTRY))

    @register_barrier
    class FileBarrier(Barrier):
        barrier_type = "file"

        def __init__(self, folder):
            self.folder = folder

        def execute_barrier(self):
            pass

    barrier = create_barrier_from_config(BarrierConfig("file", {"folder": "/shared"}))
    assert isinstance(barrier, FileBarrier)
    assert barrier.folder == "/shared"
    barrier.abandon("no way to tell anybody, and no error either")


def test_a_barrier_without_a_name_cannot_be_registered():
    class Nameless(Barrier):
        def execute_barrier(self):
            pass

    with pytest.raises(ConfigError, match=r"Nameless cannot be registered.*barrier_type"):
        register_barrier(Nameless)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("global_rank", 3),
        ("global_rank", -1),
        ("global_rank", "first"),
        ("global_world_size", 0),
        ("tcpstore_port", 65536),
        ("tcpstore_port", None),
        ("timeout_barrier_init_secs", 0),
        ("timeout_secs", -5),
        ("timeout_secs", float("nan")),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_opened(monkeypatch, argument, value):
    monkeypatch.setattr(dist, "TCPStore", MagicMock(side_effect=AssertionError("a store was opened")))
    with pytest.raises(ConfigError, match=argument):
        TCPStoreBarrier(**store_arguments(0, 3, 1234, **{argument: value}))


def test_dist_barrier_needs_a_process_group():
    # AssertionError is what PyTorch's own raises, so it is what users' code catches.
    for expected in (AssertionError, ConfigError):
        with pytest.raises(expected, match="init_process_group"):
            DistBarrier()


# What reaches torch


@pytest.fixture
def recorded(monkeypatch):
    """Stand-ins for torch's store and torch's barrier, put in after lastgood was imported."""
    made, met = MagicMock(), MagicMock()
    monkeypatch.setattr("torch.distributed.TCPStore", made)
    monkeypatch.setattr("torch.distributed.elastic.utils.store.barrier", met)
    return made, met


@pytest.mark.parametrize("rank", [0, 2])
def test_the_store_is_made_by_one_call(recorded, rank):
    made, _ = recorded
    TCPStoreBarrier(**store_arguments(rank, 4, 1234, timeout_barrier_init_secs=7))
    made.assert_called_once_with(HOST, 1234, world_size=4, timeout=timedelta(seconds=7), is_master=rank == 0)


def test_arguments_may_be_strings_from_the_environment(recorded):
    made, _ = recorded
    TCPStoreBarrier(**store_arguments("0", "4", "1234"))
    made.assert_called_once_with(HOST, 1234, world_size=4, timeout=timedelta(seconds=60), is_master=True)


def test_the_wish_for_no_libuv_reaches_the_store(recorded):
    made, _ = recorded
    TCPStoreBarrier(**store_arguments(0, 4, 1234, use_checkpoint_barrier_tcpstore_libuv=False))
    assert made.call_args.kwargs["use_libuv"] is False


@pytest.mark.parametrize("world_size", [1, 4])
def test_each_meeting_publishes_its_number_and_passes_torchs_barrier(recorded, world_size):
    made, met = recorded
    barrier = TCPStoreBarrier(**store_arguments(0, world_size, 1234, barrier_prefix="save"))
    store = made.return_value
    for sequence in ("0", "1", "2"):
        store.set.reset_mock()
        met.reset_mock()
        barrier.execute_barrier()
        assert store.set.mock_calls == [call("rank0", sequence)]
        assert met.mock_calls == [call(store=store, world_size=world_size, key_prefix=f"save{sequence}")]


# Meeting


def test_nobody_leaves_before_all_have_come(three_ranks):
    rounds = 20
    log: list[tuple[str, int]] = []

    def visit(barrier):
        for number in range(rounds):
            log.append(("comes", number))
            barrier.execute_barrier()
            log.append(("leaves", number))

    assert finished([start(visit, barrier) for barrier in three_ranks]) == [None] * 3
    for number in range(rounds):
        last_coming = max(place for place, entry in enumerate(log) if entry == ("comes", number))
        assert log.index(("leaves", number)) > last_coming


def test_what_a_meeting_leaves_in_the_store_does_not_grow_with_the_ranks(three_ranks):
    meetings = 4
    for _ in range(meetings):
        assert meet(three_ranks) == [None] * 3
    store = three_ranks[0]._store
    comings = [f"lastgood/save/{number}/came/{rank}" for number in range(meetings) for rank in range(3)]
    # Those of the last meeting are still needed, to tell who came.
    assert [key for key in comings if store.check([key])] == comings[-3:]


def test_one_rank_alone_meets_itself(port):
    barrier = TCPStoreBarrier(**store_arguments(0, 1, port))
    barrier.execute_barrier()
    barrier.execute_barrier()


def test_two_barriers_at_the_same_time_do_not_mix():
    with reserved_port() as first_port, reserved_port() as second_port:
        first = make_together([store_arguments(rank, 2, first_port, barrier_prefix="model") for rank in range(2)])
        second = make_together([store_arguments(rank, 2, second_port, barrier_prefix="data") for rank in range(2)])
        for _ in range(3):
            # Each rank visits them in the order opposite to the other's.
            visits = [start(barrier.execute_barrier) for barrier in (first[0], second[1], second[0], first[1])]
            assert finished(visits) == [None] * 4


def test_two_prefixes_on_one_store_do_not_mix(port, monkeypatch):
    """Both publish their number under the key ``rank<r>``: what the one writes must not pass for the other's coming."""
    shared = [barrier._store for barrier in make_together([store_arguments(rank, 2, port) for rank in range(2)])]
    monkeypatch.setattr(dist, "TCPStore", lambda *_, is_master, **__: shared[0 if is_master else 1])
    model, data = (
        [TCPStoreBarrier(**store_arguments(rank, 2, port, barrier_prefix=prefix, timeout_secs=secs)) for rank in (0, 1)]
        for prefix, secs in (("model", 0.3), ("data", 600))
    )
    for _ in range(3):
        assert meet(data) == [None, None]
    # The store says rank1 = 2 by now, but that was the other barrier.
    [error] = meet(model[:1])
    assert isinstance(error, BarrierTimeoutError)
    assert error.missing_ranks == (1,)
    [late] = meet(model[1:])
    assert isinstance(late, BarrierTimeoutError)
    for _ in range(2):
        assert meet(data) == [None, None]
        assert meet(model) == [None, None]


# Not meeting


def test_hazard_27_barrier_timeout_is_applied(port):
    world_size, absent = 5, (1, 3)
    ranks = make_together([store_arguments(rank, world_size, port, timeout_secs=0.5) for rank in range(world_size)])
    came = [rank for rank in range(world_size) if rank not in absent]
    before = time.monotonic()
    errors = meet([ranks[rank] for rank in came])
    assert time.monotonic() - before < 20
    for rank, error in zip(came, errors, strict=True):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == absent
        assert error.rank == rank
        assert "waited 0.5 s for ranks 1, 3" in str(error)
        assert "earlier ones are untouched" in str(error)


def test_a_rank_that_is_late_never_meets_torchs_own_wait(three_ranks, monkeypatch):
    """When that ends, it asks the name service who the other end is, however long this may take."""
    monkeypatch.setattr(dist.TCPStore, "wait", MagicMock(side_effect=AssertionError("torch waits")))
    monkeypatch.setattr(three_ranks[0], "_timeout_secs", 0.3)
    for error in meet([three_ranks[0], three_ranks[2]]):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)


def test_after_a_timeout_latecomers_fail_at_once_and_the_next_meeting_works(three_ranks, monkeypatch):
    monkeypatch.setattr(three_ranks[0], "_timeout_secs", 0.3)
    # Rank 2 would wait ten minutes: that rank 0 gave up must reach it.
    for error in meet([three_ranks[0], three_ranks[2]]):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)
        assert "rank 0 waited 0.3 s for rank 1" in str(error)
    [late] = meet([three_ranks[1]])
    assert isinstance(late, BarrierTimeoutError)
    assert "rank 0 waited 0.3 s for rank 1" in str(late)
    monkeypatch.setattr(three_ranks[0], "_timeout_secs", 600)
    assert meet(three_ranks) == [None] * 3


@pytest.mark.parametrize("first", ["the others wait already", "nobody is there yet"])
def test_hazard_26_a_rank_that_fails_tells_the_others(three_ranks, first):
    if first == "nobody is there yet":
        three_ranks[1].abandon("No space left on device")
    waiting = [start(three_ranks[rank].execute_barrier) for rank in (0, 2)]
    if first == "the others wait already":
        three_ranks[1]._store.wait(["rank0", "rank2"])
        three_ranks[1].abandon("No space left on device")
    for error in finished(waiting):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)
        assert "rank 1 gave up before it came: No space left on device" in str(error)
    # All have had one meeting: the next is the same one for everybody.
    assert meet(three_ranks) == [None] * 3


def test_a_meeting_that_the_last_to_come_could_not_declare_takes_place(port, monkeypatch):
    """The last rank may die between coming and saying that all have come; the others find out when time is over."""
    ranks = make_three(port, (0.3, 0.3, 0.3))
    declare = TCPStoreBarrier._decide
    silent = threading.Event()

    def decide(self, sequence, outcome):
        if silent.is_set():
            declare(self, sequence, outcome)
        silent.set()

    monkeypatch.setattr(TCPStoreBarrier, "_decide", decide)
    assert meet(ranks) == [None] * 3


def test_hazard_29_a_rank_started_again_alone_does_not_pass_barriers_of_the_past(port):
    ranks = make_together([store_arguments(rank, 2, port) for rank in range(2)])
    for _ in range(3):
        assert meet(ranks) == [None, None]
    zombie = TCPStoreBarrier(**store_arguments(1, 2, port))
    [error] = meet([zombie])
    assert isinstance(error, ConfigError)
    assert "Rank 1 has been at barrier 0 of 'save' before" in str(error)


def test_hazard_29_two_processes_of_the_same_rank_do_not_count_as_two_ranks(port):
    ranks = make_three(port, (600, 600, 600))
    waiting = start(ranks[1].execute_barrier)
    ranks[0]._store.wait(["rank1"])
    twin = TCPStoreBarrier(**store_arguments(1, 3, port))
    # The first of the two to come is the one that counts; which that is does not matter.
    other = start(twin.execute_barrier)
    rest = [start(ranks[rank].execute_barrier) for rank in (0, 2)]
    outcomes = finished([waiting, other])
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ConfigError", "NoneType"]
    assert finished(rest) == [None, None]


def test_a_long_list_of_missing_ranks_is_cut_in_the_message_only(monkeypatch):
    # torch's store within one process stands in for a server that forty ranks would have to reach.
    store = dist.HashStore()
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: store)
    barrier = TCPStoreBarrier(**store_arguments(0, 40, 1234, timeout_secs=0.2))
    with pytest.raises(BarrierTimeoutError, match=r"for ranks 1, 2, .*, 16 and 23 more\.") as caught:
        barrier.execute_barrier()
    assert caught.value.missing_ranks == tuple(range(1, 40))


def test_a_store_closed_right_after_the_meeting_is_no_failure(three_ranks, monkeypatch):
    """Rank 0 may leave first after its last checkpoint, and takes the store along: all had come all the same."""
    closed = MagicMock(side_effect=dist.DistNetworkError("Connection was likely closed."))
    monkeypatch.setattr("torch.distributed.elastic.utils.store.barrier", closed)
    assert meet(three_ranks) == [None] * 3
    assert closed.call_count == 3


def test_hazard_27_torchs_barrier_cannot_outlast_the_timeout(port, monkeypatch, impatient):
    """It waits five minutes, whatever was configured, for a rank that died after it came."""
    over = threading.Event()
    monkeypatch.setattr("torch.distributed.elastic.utils.store.barrier", lambda **_: over.wait())
    barrier = TCPStoreBarrier(**store_arguments(0, 1, port, timeout_secs=0.2))
    try:
        with pytest.raises(BarrierTimeoutError, match=rf"the store at {HOST}:{port}.*within 0\.2 s"):
            barrier.execute_barrier()
    finally:
        over.set()


def test_hazard_27_torchs_own_timeout_becomes_ours(port, monkeypatch):
    late = MagicMock(side_effect=dist.DistStoreError("wait timeout after 300000ms"))
    monkeypatch.setattr("torch.distributed.elastic.utils.store.barrier", late)
    barrier = TCPStoreBarrier(**store_arguments(0, 1, port))
    with pytest.raises(BarrierTimeoutError, match="did not let it through") as caught:
        barrier.execute_barrier()
    assert isinstance(caught.value.__cause__, dist.DistStoreError)


# Not even getting to meet


def test_without_rank_0_the_error_says_where_it_was_looked_for(port):
    with pytest.raises(BarrierTimeoutError, match=rf"Rank 1 of 2 could not reach.*{HOST}:{port} within 1 s") as caught:
        TCPStoreBarrier(**store_arguments(1, 2, port, timeout_barrier_init_secs=1))
    assert caught.value.missing_ranks == (0,)
    assert caught.value.rank == 1


def test_without_the_others_rank_0_says_how_many_came(port):
    with pytest.raises(BarrierTimeoutError, match=rf"Rank 0 of 2 could not keep.*{HOST}:{port}.*1/2 clients joined"):
        TCPStoreBarrier(**store_arguments(0, 2, port, timeout_barrier_init_secs=1))


def test_a_port_that_is_taken_is_a_matter_of_configuration(port):
    barrier = TCPStoreBarrier(**store_arguments(0, 1, port))
    with pytest.raises(ConfigError, match=rf"tcpstore_port {port} is in use"):
        TCPStoreBarrier(**store_arguments(0, 1, port))
    barrier.execute_barrier()


def test_a_server_that_never_answers_does_not_hold_the_rank_for_ever(impatient):
    with socket.create_server((HOST, 0)) as silent:
        silent_port = silent.getsockname()[1]
        with pytest.raises(BarrierTimeoutError, match=rf"Rank 1 of 2 .*{HOST}:{silent_port} within 0\.5 s: no answer"):
            TCPStoreBarrier(**store_arguments(1, 2, silent_port, timeout_barrier_init_secs=0.5))


def test_abandon_does_its_best_and_never_raises(port, monkeypatch, caplog):
    barrier = TCPStoreBarrier(**store_arguments(0, 1, port))
    monkeypatch.setattr(barrier, "_store", MagicMock(**{"set.side_effect": dist.DistNetworkError("Broken pipe")}))
    barrier.abandon("disk full")
    assert "disk full" in caplog.text
    assert "Broken pipe" in caplog.text
