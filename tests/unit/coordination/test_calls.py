"""What ranks find out without talking, and how they get to the store in which they meet."""

import pickle
import threading

import pytest
from tests.distributed.barrier_ranks import start
from tests.helpers.workers import PATIENCE_SECS
from tests.unit.coordination.ranks_here import coordinations

from lastgood._coordination import calls, connection
from lastgood._coordination.calls import SaveCall, SaveCalls
from lastgood._coordination.connection import Connection, StoreUnreachableError, serve
from lastgood.format.epoch import Epoch


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
