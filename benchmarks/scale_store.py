"""The store of a commit for real, as far as one machine goes: a TCPStore on loopback and many clients of it."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lastgood._coordination.meeting import ALL_CAME, Meeting, wait_for
from lastgood._coordination.tables import send_tables, table_key

HOST = "127.0.0.1"
VOTES_AT_ONCE = 512
"""As many votes rank 0 asks for in one message."""

_PATIENCE_SECS = 120
_SERVE = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class CountingStore:
    """A store that counts the messages which go to it, and the bytes of the values in them.

    Not what a rank asks while it waits (:func:`wait_until`): that depends on how long it waits.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.messages = 0
        self.sent: Counter[str] = Counter()

    def has(self, key: str) -> bool:
        """Whether something is in the store; not counted."""
        return bool(self._store.check([key]))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            self.messages += 1
            if name == "set":
                self.sent[arguments[0].split("/")[0]] += len(arguments[1])
            return call(*arguments)

        return counted


@dataclass
class Round:
    """How one commit of so many ranks went."""

    ranks: int
    vote_secs: float = 0.0
    """From the first vote until all know that all have voted."""

    commit_secs: float = 0.0
    """From then until all know that rank 0 has committed; what rank 0 does besides is left out."""

    messages_of_rank: int = 0
    messages_of_rank_0: int = 0
    vote_bytes: int = 0
    table_bytes: int = 0
    """Of the table of all ranks, once."""

    table_bytes_sent: int = 0
    """What arrived of it at the store."""

    failures: list[BaseException] = field(default_factory=list)


def measure_commit(ranks: int, votes: list[bytes], table: bytes) -> Round:
    """One commit: each rank a thread with a connection of its own, the store in another process."""
    found = Round(ranks, vote_bytes=len(votes[0]), table_bytes=len(table))
    with _served_store() as port:
        stores = [CountingStore(_connect(port)) for _ in range(ranks)]
        _run_ranks(found, stores, votes, table)
    if found.failures:
        raise found.failures[0]
    found.messages_of_rank_0 = stores[0].messages
    found.messages_of_rank = max(store.messages for store in stores[1:])
    found.table_bytes_sent = sum(store.sent["tables"] for store in stores)
    return found


@contextmanager
def _served_store() -> Iterator[int]:
    """The port of a store in a process of its own."""
    server = subprocess.Popen([sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.communicate()


def _connect(port: int) -> Any:
    return dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_PATIENCE_SECS))  # type: ignore[attr-defined]


def _run_ranks(found: Round, stores: list[CountingStore], votes: list[bytes], table: bytes) -> None:
    together = threading.Barrier(found.ranks + 1)

    def rank_thread(rank: int) -> None:
        try:
            together.wait()
            vote(stores[rank], rank, found.ranks, votes[rank], table)
            together.wait()
            together.wait()
            finish(stores[rank], rank, found.ranks)
            together.wait()
        except BaseException as error:
            found.failures.append(error)
            together.abort()

    threads = [threading.Thread(target=rank_thread, args=(rank,), daemon=True) for rank in range(found.ranks)]
    for thread in threads:
        thread.start()
    try:
        together.wait()
        start = time.perf_counter()
        together.wait()
        found.vote_secs = time.perf_counter() - start
        together.wait()
        start = time.perf_counter()
        together.wait()
        found.commit_secs = time.perf_counter() - start
    except threading.BrokenBarrierError as error:
        found.failures.append(error)
    for thread in threads:
        thread.join()


def wait_until(store: CountingStore, key: str, world_size: int) -> None:
    """Wait as a rank does."""
    if not wait_for(lambda _: store.has(key), _PATIENCE_SECS, world_size):
        raise TimeoutError(f"{key} did not come within {_PATIENCE_SECS} s")


def vote(store: CountingStore, rank: int, world_size: int, ballot: bytes, table: bytes) -> None:
    """What a rank says to the store until all have voted."""
    meeting = Meeting(store, "save/1", rank, world_size)
    if rank:
        wait_until(store, meeting.key("opened"), world_size)
        store.get(meeting.key("opened"))
    else:
        store.set(meeting.key("opened"), "{}")
    send_tables(store, rank, {"1": table})
    store.set(meeting.key("vote", rank), ballot)
    if meeting.arrive() == world_size:
        meeting.decide(ALL_CAME)
    wait_until(store, meeting.key("decided"), world_size)
    meeting.outcome()


def finish(store: CountingStore, rank: int, world_size: int) -> None:
    """What a rank says to it from then on."""
    meeting = Meeting(store, "save/1", rank, world_size)
    if rank:
        wait_until(store, meeting.key("result"), world_size)
        store.get(meeting.key("result"))
        store.add(meeting.key("heard"), 1)
        return
    for first in range(0, world_size, VOTES_AT_ONCE):
        last = min(first + VOTES_AT_ONCE, world_size)
        store.multi_get([meeting.key("vote", other) for other in range(first, last)])
    store.get(table_key("1"))
    store.set(meeting.key("result"), ALL_CAME.encode())
