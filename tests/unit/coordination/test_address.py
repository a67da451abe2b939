"""How the ranks of a process group find where to meet."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.distributed.barrier_ranks import start
from tests.helpers.workers import PATIENCE_SECS, Worker

from lastgood._coordination import address
from lastgood._coordination.address import find_address, is_of_process_group, meet_over_process_group
from lastgood._coordination.calls import Coordination
from lastgood._coordination.connection import Connection, serve
from lastgood.builder import make_sync_checkpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import BarrierTimeoutError, ConfigError, LastgoodError
from lastgood.types import RankInfo


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a process group of one."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def offer() -> Coordination:
    return find_address(RankInfo(0, 1), lambda ask: ask())


def test_rank_0_offers_a_port_at_which_it_can_be_reached(group: None) -> None:
    found = offer()
    assert found.listener is not None
    server = serve(found.listener, found.world_size)
    client = Connection(found.host, found.port, served_here=False)
    client.open(PATIENCE_SECS)
    assert client.call(lambda store: store.add("x", 1), 5) == 1
    client.close()
    del server
    found.close()


def test_without_a_known_address_the_name_of_the_machine_is_told(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    found = offer()
    assert found.host == socket.gethostname()
    found.close()


def test_a_job_is_a_process_group_and_a_checkpointer_a_series_of_its_own(group: None, tmp_path: Path) -> None:
    first, second = offer(), offer()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/again", rank=0, world_size=1)
    third = offer()
    assert first.job == second.job != third.job
    assert len({first.series, second.series, third.series}) == 3
    for each in (first, second, third):
        each.close()


def test_only_the_ranks_of_the_default_process_group_can_meet(group: None) -> None:
    assert is_of_process_group(RankInfo(0, 1))
    assert not is_of_process_group(RankInfo(0, 2))
    dist.destroy_process_group()
    assert not is_of_process_group(RankInfo(0, 1))


def test_ranks_that_are_of_no_process_group_stay_independent(tmp_path: Path) -> None:
    checkpointer = make_sync_checkpointer(CheckpointerConfig(), RankInfo(1, 2))
    checkpointer.save(str(tmp_path), {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1.pt"]
    checkpointer.close()


def test_without_gloo_there_is_advice(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(ConfigError, match="configure a barrier of the type tcp_store"):
        meet_over_process_group(RankInfo(0, 1))


@pytest.mark.parametrize("where", ["new_group", "broadcast_object_list"])
def test_a_rank_that_meets_nobody_says_what_to_check(group: None, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, where, lost)
    with pytest.raises(
        BarrierTimeoutError, match=r"Connection closed by peer.*Does every rank .* make its checkpointer"
    ):
        meet_over_process_group(RankInfo(0, 1))


def test_what_goes_wrong_on_rank_0_is_raised(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_port() -> socket.socket:
        raise LastgoodError("no port is free")

    monkeypatch.setattr(address, "_listen", no_port)
    with pytest.raises(LastgoodError, match="no port is free"):
        meet_over_process_group(RankInfo(0, 1))


# With a process a rank


def join(rank: int, rendezvous: str) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)


def save_by_default(path: str, rank: int) -> list[str]:
    """With a checkpointer made without any argument."""
    checkpointer = make_sync_checkpointer()
    checkpointer.save(path, {"rank": rank})
    assert checkpointer.load(path) == {"rank": rank}
    checkpointer.close()
    return sorted(os.listdir(path))


def fail_to_listen() -> str:
    def no_port() -> socket.socket:
        raise OSError("no port is free")

    address._listen = no_port
    try:
        make_sync_checkpointer()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "made"


def test_checkpointers_made_by_default_in_a_process_group_commit_together(tmp_path: Path) -> None:
    ranks = [Worker(), Worker()]
    try:
        for rank, worker in enumerate(ranks):
            worker.start(join, rank, str(tmp_path / "rendezvous"))
        for worker in ranks:
            worker.result()
        for rank, worker in enumerate(ranks):
            worker.start(save_by_default, str(tmp_path / "step-1"), rank)
        for worker in ranks:
            assert worker.result() == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
        for worker in ranks:
            worker.start(fail_to_listen)
        assert ranks[0].result() == "OSError: no port is free"
        assert ranks[1].result() == "LastgoodError: rank 0 failed: OSError: no port is free"
    finally:
        for worker in ranks:
            worker.kill()


def test_a_meeting_of_one_is_held_alone(group: None) -> None:
    found = start(meet_over_process_group, RankInfo(0, 1)).result(PATIENCE_SECS)
    assert (found.rank, found.world_size) == (0, 1)
    found.close()
