"""What the other ranks are told of a save that has failed on one of them, and by what way when their store is gone."""

from typing import Any

from lastgood import _events
from lastgood._coordination.calls import Coordination, SaveCall, SaveCalls
from lastgood._coordination.connection import ANSWER_SECS, Connection, StoreUnreachableError
from lastgood._coordination.exchange import save_prefix
from lastgood._coordination.meeting import Meeting, Outcome
from lastgood._threads import start_daemon

GIVEN_UP = "given up"
"""Stands in the place of the epoch, for those who wait for rank 0 to begin."""


def given_up_by(rank: int, error: BaseException) -> Outcome:
    """What the others are told."""
    return Outcome(f"rank {rank} gave up: {type(error).__name__}: {error}", (rank,))


def give_up_in(store: Any, save_id: str, outcome: Outcome) -> None:
    """End a save for all ranks that have not been told another outcome, wherever they wait for votes."""
    meeting = Meeting(store, save_prefix(save_id), 0, 0)
    meeting.decide(outcome)
    if outcome.reason is not None and not store.check([meeting.key("opened")]):
        store.set(meeting.key("opened"), GIVEN_UP)


def hear_in(store: Any, save_id: str, world_size: int) -> None:
    """Count one rank, other than rank 0, that knows how a save ended; rank 0 may leave when all do."""
    if int(store.add(f"{save_prefix(save_id)}/heard", 1)) == world_size - 1:
        store.set(f"{save_prefix(save_id)}/all heard", "1")


def is_decided_in(store: Any, save_id: str) -> bool:
    """Whether all ranks know, or can know, how the votes for a save ended."""
    return Meeting(store, save_prefix(save_id), 0, 0).is_decided


def tell_later(coordination: Coordination, calls: SaveCalls, call: SaveCall, outcome: Outcome) -> None:
    """Tell the others in the background that this rank's part of a save has failed. Never raises.

    The store may be gone with rank 0's checkpoint process, and the next one, which serves it anew, may make its part of
    the same save after all. Until the others could be told, each later call takes the news along.
    """
    calls.could_not_tell(call, str(outcome.reason))
    if start_daemon(lambda: _tell(coordination, calls, call, outcome), name="lastgood-give-up") is None:
        _events.logger.warning("could not tell the other ranks, at the end of this process, that a save failed")


def _tell(coordination: Coordination, calls: SaveCalls, call: SaveCall, outcome: Outcome) -> None:
    connection = Connection(coordination.host, coordination.port, served_here=coordination.rank == 0)
    try:
        connection.open(ANSWER_SECS)
        # Most of what fails in a checkpoint process has been told by it.
        if not connection.call(lambda store: is_decided_in(store, call.save_id), ANSWER_SECS):
            connection.call(lambda store: give_up_in(store, call.save_id, outcome), ANSWER_SECS)
            if coordination.rank != 0:
                connection.call(lambda store: hear_in(store, call.save_id, coordination.world_size), ANSWER_SECS)
        calls.told(call)
    except StoreUnreachableError as failure:
        _events.logger.info("could not tell the other ranks that %s: %s", outcome.reason, failure)
