"""What grows with the number of ranks, and what must not: counted in calls, messages and bytes, not in seconds.

``benchmarks/scale.py`` measures the same for as many ranks as anybody has.
"""

import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from benchmarks import scale_states
from tests.distributed.barrier_ranks import finished, start
from tests.unit.sharding.ballots import rank_file

from lastgood._coordination.calls import Coordination
from lastgood._coordination.connection import Connection
from lastgood._coordination.together import Coordinator
from lastgood.format import sharding
from lastgood.format.manifest import Manifest, encode_manifest
from lastgood.format.mesh import Mesh, check_mesh
from lastgood.storage.local import LocalStorage

MANY = 16384
TENSORS = 120


def calls_of(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls, those written in C included, with nothing remembered from before."""
    for cached in vars(sharding).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def save_calls(kind: scale_states.Parallelism, ranks: int, tensors: int = TENSORS) -> int:
    """Of one rank that plans what it writes, of a state of which it holds as much whatever the number of ranks."""
    mesh = kind.mesh(ranks)
    check_mesh(mesh)  # looks at all ranks: once for all tensors
    shards = scale_states.SHARDS_OF_HSDP if kind is scale_states.HSDP else ranks
    names, sizes = scale_states.tensor_names(tensors), scale_states.shapes(tensors, shards)
    return calls_of(lambda: scale_states.plan_save(kind, mesh, names, sizes, ranks // 3))


def ballot_of_one(ranks: int, tensors: int = TENSORS) -> scale_states.Ballot:
    mesh = scale_states.FSDP_TP.mesh(ranks)
    names, sizes = scale_states.tensor_names(tensors), scale_states.shapes(tensors, 512)
    plan = scale_states.plan_save(scale_states.FSDP_TP, mesh, names, sizes, 0)
    return scale_states.ballot(scale_states.index_of(plan, mesh, 0, ranks))


def manifest_of(ranks: int, tensors: int = TENSORS) -> Manifest:
    ballot = ballot_of_one(ranks, tensors)
    return scale_states.count(scale_states.votes_of_all(ballot, ranks, each_differs=False), ballot)


# Saving


@pytest.mark.parametrize("kind", scale_states.KINDS, ids=lambda kind: kind.name)
def test_hazard_25_planning_a_save_takes_a_rank_no_longer_where_there_are_more(kind: scale_states.Parallelism) -> None:
    few, many = save_calls(kind, 64), save_calls(kind, MANY)
    assert many <= 1.05 * few
    assert few > TENSORS, "that anything was counted"


def test_planning_a_save_takes_as_long_as_there_are_tensors() -> None:
    assert save_calls(scale_states.FSDP_TP, MANY, 4 * TENSORS) <= 4.2 * save_calls(scale_states.FSDP_TP, MANY, TENSORS)


# Voting


def test_a_vote_is_of_the_same_size_whatever_the_number_of_ranks_and_tensors() -> None:
    sizes = [len(ballot_of_one(ranks, tensors).vote) for ranks in (64, MANY) for tensors in (10, 1000)]
    assert max(sizes) - min(sizes) < 20, "but for digits"


def test_what_all_ranks_say_alike_grows_with_the_tensors_and_by_the_number_of_a_rank() -> None:
    by_size = {
        (ranks, tensors): sum(map(len, ballot_of_one(ranks, tensors).tables.values()))
        for ranks in (64, MANY)
        for tensors in (10, 1000)
    }
    assert by_size[MANY, 1000] - by_size[64, 1000] == by_size[MANY, 10] - by_size[64, 10] <= 6 * MANY
    assert by_size[MANY, 1000] - by_size[MANY, 10] == by_size[64, 1000] - by_size[64, 10] <= 100 * 1000


# Counting


@pytest.mark.parametrize("each_differs", [False, True], ids=["all alike", "a value of its own each"])
def test_hazard_25_counting_takes_rank_0_as_long_as_there_are_ranks(each_differs: bool) -> None:
    found = []
    for ranks in (512, 2048):
        ballot = ballot_of_one(ranks)
        votes = scale_states.votes_of_all(ballot, ranks, each_differs=each_differs)
        found.append(calls_of(lambda votes=votes, ballot=ballot: encode_manifest(scale_states.count(votes, ballot))))
    assert found[1] <= 4.2 * found[0]
    assert found[1] > 2048, "that anything was counted"


def test_the_manifest_grows_by_a_line_a_rank_and_a_line_a_tensor() -> None:
    sizes = {
        (ranks, tensors): len(encode_manifest(manifest_of(ranks, tensors)))
        for ranks in (1000, 2000)
        for tensors in (10, 500)
    }
    of_ranks = [sizes[2000, tensors] - sizes[1000, tensors] for tensors in (10, 500)]
    assert abs(of_ranks[0] - of_ranks[1]) < 10, "but for the digits of its checksum"
    assert max(of_ranks) < 170 * 1000
    assert sizes[1000, 500] - sizes[1000, 10] < 100 * 490


# Loading


@pytest.mark.parametrize("factor", [0.5, 2])
def test_hazard_25_finding_the_pieces_for_a_rank_takes_hardly_longer_where_there_are_more_ranks(factor: float) -> None:
    """Of tensors of the same shapes: the shards are smaller, and the work is that for the pieces which are found."""
    found = {}
    for ranks in (64, 4096):
        manifest = manifest_of(ranks)
        mesh = scale_states.FSDP_TP.mesh(int(ranks * factor))
        check_mesh(mesh)
        readers = range(0, int(ranks * factor), int(ranks * factor) // 8)
        pieces = 0

        def plan(manifest: Manifest = manifest, mesh: Mesh = mesh, readers: Sequence[int] = readers) -> None:
            nonlocal pieces
            for reader in readers:
                pieces += scale_states.plan_load(manifest, scale_states.FSDP_TP, mesh, reader)[0]

        found[ranks] = calls_of(plan) / pieces
    assert found[4096] <= 2 * found[64], "64 times as many ranks; a search that looks at each takes 64 times as long"


def test_whoever_wants_everything_takes_as_long_as_there_are_pieces() -> None:
    found = []
    for ranks in (64, 512):
        manifest = manifest_of(ranks, 10)
        mesh = scale_states.FSDP_TP.mesh(1)
        found.append(calls_of(lambda manifest=manifest, mesh=mesh: whole_load(manifest, mesh)))
    assert found[1] <= 8.5 * found[0]


def whole_load(manifest: Manifest, mesh: Mesh) -> None:
    pieces, ranks = scale_states.plan_load(manifest, scale_states.FSDP_TP, mesh, 0)
    assert len(ranks) == manifest.world_size
    assert pieces >= manifest.world_size * len(manifest.tensors)


# Messages


AWAITED = ("opened", "decided", "result", "all heard")


class Counted:
    """A store, and how many messages each thread sends to it, not counting looks for what it waits for."""

    def __init__(self, store: Any, counts: Counter[str], rank: str) -> None:
        self._store, self._counts, self._rank = store, counts, rank

    def __getattr__(self, name: str) -> Any:
        self._counts[self._rank] += 1
        return getattr(self._store, name)

    def check(self, keys: list[str]) -> bool:
        self._counts[self._rank] += not keys[0].endswith(AWAITED)
        return bool(self._store.check(keys))


def messages_of_a_save(directory: Path, ranks: int, monkeypatch: pytest.MonkeyPatch, order: Sequence[int]) -> list[int]:
    """The messages of each rank in its second save, in which there is something of the first to be removed."""
    counts: Counter[str] = Counter()
    real_call = Connection.call
    numbers: dict[int, str] = {}

    def call(self: Connection, use: Callable[[Any], Any], timeout_secs: float) -> Any:
        return real_call(self, lambda store: use(Counted(store, counts, numbers[id(self)])), timeout_secs)

    monkeypatch.setattr(Connection, "call", call)
    listener = socket.create_server(("localhost", 0), family=socket.AF_INET)
    port = listener.getsockname()[1]
    coordinators = [
        Coordinator(Coordination(rank, ranks, "localhost", port, "job", "series", None if rank else listener), 60)
        for rank in range(ranks)
    ]
    numbers.update({id(each._connection): str(rank) for rank, each in enumerate(coordinators)})
    try:
        for step in (1, 2):
            counts.clear()
            path = directory / f"step-{step}"
            path.mkdir(parents=True)
            barrier = threading.Barrier(ranks)
            states = [{"w": torch.ones(4), "seed": rank} for rank in range(ranks)]
            parts = [start(_take_part, coordinators[rank], path, states[rank], ranks, barrier) for rank in order]
            assert finished(parts) == [None] * ranks
        return [counts[str(rank)] for rank in range(ranks)]
    finally:
        for coordinator in coordinators[::-1]:
            coordinator.close()


def _take_part(coordinator: Coordinator, path: Path, state: Any, ranks: int, barrier: threading.Barrier) -> None:
    rank = coordinator.coordination.rank
    part = coordinator.save(None, str(path), LocalStorage())
    part.begin()
    with part.publication():
        rank_file(path, rank, ranks, state, ["w"], save_id=part.save_id, voted_save=part.save_id)
    barrier.wait()  # so that all of them find the store as it is before anybody votes
    part.vote()
    part.commit()


def test_a_rank_sends_as_many_messages_however_many_others_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng_seed: int
) -> None:
    by_ranks: dict[int, list[int]] = {}
    for ranks in (3, 12):
        order = random.Random(rng_seed).sample(range(ranks), ranks)
        with monkeypatch.context() as patched:
            by_ranks[ranks] = messages_of_a_save(tmp_path / str(ranks), ranks, patched, order)
    # The last to vote says so in two messages more, and a table is sent by those that found it missing.
    for counts in by_ranks.values():
        assert all(0 < count <= 25 for count in counts), by_ranks
    assert abs(by_ranks[3][0] - by_ranks[12][0]) <= 3, by_ranks
    assert abs(max(by_ranks[3][1:]) - max(by_ranks[12][1:])) <= 3, by_ranks
