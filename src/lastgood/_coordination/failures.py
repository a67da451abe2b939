"""What the other ranks are told of a save that has failed on one of them, and by what way when their store is gone."""

import dataclasses
import threading
import time
from collections import OrderedDict
from typing import Any

from lastgood import _events
from lastgood._coordination.calls import Coordination, SaveCall
from lastgood._coordination.connection import ANSWER_SECS, Connection, StoreUnreachableError
from lastgood._coordination.exchange import save_prefix
from lastgood._coordination.meeting import Meeting, Outcome
from lastgood._threads import start_daemon

GIVEN_UP = "given up"
"""Stands in the place of the epoch, for those who wait for rank 0 to begin."""

_FAILURES_REMEMBERED = 64
_NEWS_SECS = 30.0
"""How long a rank that has something to tell stays for that: another process of rank 0 may be starting."""


class FailedSaves:
    """Those that have failed on this rank, until a later save has made sure that the others know.

    The store may be gone with rank 0's checkpoint process, and with it what it has been told. The next process, which
    serves it anew, may make its part of the same save after all, and then waits for this rank.
    """

    def __init__(self, coordination: Coordination, timeout_secs: float) -> None:
        self._coordination = dataclasses.replace(coordination, listener=None)
        self._timeout_secs = timeout_secs
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler may save in the middle of a save
        self._tellers: list[threading.Thread] = []

    def note(self, call: SaveCall, outcome: Outcome) -> None:
        """From now on, each call takes the news along, until they have arrived."""
        with self._lock:
            self._reasons[call.save_id] = str(outcome.reason)
            if len(self._reasons) > _FAILURES_REMEMBERED:
                self._reasons.popitem(last=False)

    def with_news(self, call: SaveCall) -> SaveCall:
        """The call with what has failed by now, here and where it comes from."""
        with self._lock:
            failed = tuple((dict(call.failed) | self._reasons).items())
        return call if failed == call.failed else dataclasses.replace(call, failed=failed)

    def arrived(self, call: SaveCall) -> None:
        """The others know of what this call took along."""
        with self._lock:
            for save_id, _ in call.failed:
                self._reasons.pop(save_id, None)

    def tell(self, call: SaveCall, outcome: Outcome) -> None:
        """Note it, and tell the others in the background, for as long as they may wait. Raises only interruptions."""
        self.note(call, outcome)
        try:
            teller = start_daemon(lambda: self._tell(call, outcome), name="lastgood-give-up")
        except RuntimeError as error:  # for want of threads
            _events.logger.warning("%s: the other ranks hear with the next save that %s", error, outcome.reason)
            return
        if teller is None:
            _events.logger.warning("could not tell the other ranks, at the end of this process: %s", outcome.reason)
            return
        with self._lock:
            self._tellers = [each for each in self._tellers if each.is_alive()] + [teller]

    def close(self) -> None:
        """Before this process leaves: wait until nobody is being told anything, or for what rank 0 may take to start.

        Where nothing has failed, or rank 0 is gone, waits for nothing.
        """
        deadline = time.monotonic() + _NEWS_SECS
        with self._lock:
            tellers = self._tellers
        for teller in tellers:
            teller.join(max(0.0, deadline - time.monotonic()))

    def _tell(self, call: SaveCall, outcome: Outcome) -> None:
        coordination = self._coordination
        connection = Connection(coordination.host, coordination.port, served_here=coordination.rank == 0)
        deadline = time.monotonic() + self._timeout_secs
        try:
            is_told = False
            while not is_told:
                connection.open(max(0.0, deadline - time.monotonic()))
                with self._lock:
                    is_told = call.save_id not in self._reasons  # by a later save
                is_told = is_told or self._could_tell(connection, call, outcome)
        except StoreUnreachableError as failure:
            _events.logger.warning("could not tell the other ranks that %s: %s", outcome.reason, failure)

    def _could_tell(self, connection: Connection, call: SaveCall, outcome: Outcome) -> bool:
        try:
            connection.call(lambda store: tell_in(store, self._coordination, call.save_id, outcome), ANSWER_SECS)
        except StoreUnreachableError:
            return False  # that store is gone, too; rank 0 may be there
        return True


def given_up_by(rank: int, error: BaseException) -> Outcome:
    """What the others are told."""
    return Outcome(f"rank {rank} gave up: {type(error).__name__}: {error}", (rank,))


def tell_in(store: Any, coordination: Coordination, save_id: str, outcome: Outcome) -> None:
    """Like :func:`fail_in`, for a save whose end may have been told by who made it; this rank has heard of it then."""
    if fail_in(store, coordination.rank, save_id, outcome) and coordination.rank != 0:
        hear_in(store, save_id, coordination.world_size)


def fail_in(store: Any, rank: int, save_id: str, outcome: Outcome) -> bool:
    """End a save that has failed on this rank, for all ranks; whether they had not decided how it ended.

    Where all had voted, and rank 0 has failed since, the others wait for what it says last.
    """
    meeting = Meeting(store, save_prefix(save_id), 0, 0)
    is_first = not meeting.is_decided and give_up_in(store, save_id, outcome)
    if rank == 0:
        store.compare_set(meeting.key("result"), "", outcome.encode())
    return is_first


def give_up_in(store: Any, save_id: str, outcome: Outcome) -> bool:
    """Decide that the votes for a save have come, or not; true for one of those who try. The first decision stands."""
    meeting = Meeting(store, save_prefix(save_id), 0, 0)
    is_first = meeting.decide(outcome)
    if outcome.reason is not None and not store.check([meeting.key("opened")]):
        store.set(meeting.key("opened"), GIVEN_UP)
    return is_first


def hear_in(store: Any, save_id: str, world_size: int) -> None:
    """Count one rank, other than rank 0, that knows how a save ended; rank 0 may leave when all do."""
    if int(store.add(f"{save_prefix(save_id)}/heard", 1)) == world_size - 1:
        store.set(f"{save_prefix(save_id)}/all heard", "1")
