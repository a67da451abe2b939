"""The trainer's part in the saves that its checkpoint process makes: it asks for them, and says so when one fails."""

import dataclasses
from concurrent.futures import Future

from lastgood import _events
from lastgood._coordination.calls import Coordination, SaveCall, SaveCalls, hold_epoch, root_of
from lastgood._coordination.connection import ANSWER_SECS, Connection, StoreUnreachableError
from lastgood._coordination.meeting import Outcome
from lastgood._coordination.together import give_up_in, given_up_by, hear_in, is_decided_in
from lastgood._threads import start_daemon
from lastgood.errors import BarrierTimeoutError, SupersededError
from lastgood.storage.base import StorageBackend

_TOLD = (BarrierTimeoutError, SupersededError)
"""What a checkpoint process raises once it has told the others, or could not."""


class TrainerVotes:
    """One rank's, for one checkpointer. Nothing here keeps the training loop waiting for another rank."""

    def __init__(self, coordination: Coordination, storage: StorageBackend, timeout_secs: float) -> None:
        self._coordination = dataclasses.replace(coordination, listener=None)
        self._calls = SaveCalls(coordination)
        self._storage = storage
        self._timeout_secs = timeout_secs

    def new_call(self, path: object) -> SaveCall:
        """To be asked for before anything of a save can fail."""
        return self._calls.new(str(path))

    def with_epoch(self, call: SaveCall, path: object) -> SaveCall:
        """The call as it goes to the checkpoint process, when those before it are over: with what has failed of them,
        and on rank 0 with the job's epoch, taken at the first save."""
        call = self._calls.with_news(call)
        if self._coordination.rank != 0:
            return call
        root = root_of(str(path))
        epoch = hold_epoch(self._storage, root, self._coordination.job, self._timeout_secs, look=False)
        return dataclasses.replace(call, epoch=epoch)

    def watch(self, call: SaveCall, written: "Future[None]") -> None:
        """If this write fails, the others shall know, whatever became of the checkpoint process."""

        def ended(done: "Future[None]") -> None:
            error = done.exception()
            if error is None:
                self._calls.went_well(call)
            elif not isinstance(error, _TOLD):
                self.give_up(call, error)

        written.add_done_callback(ended)

    def give_up(self, call: SaveCall, error: BaseException) -> None:
        """Tell the others, in the background. Until that has worked, each save takes the news along: the store may be
        gone with the checkpoint process, and the next one may take long to serve it."""
        outcome = given_up_by(self._coordination.rank, error)
        self._calls.could_not_tell(call, str(outcome.reason))
        if start_daemon(lambda: self._tell(call, outcome), name="lastgood-give-up") is None:
            _events.logger.warning("could not tell the other ranks, at the end of this process, that a save failed")

    def _tell(self, call: SaveCall, outcome: Outcome) -> None:
        coordination = self._coordination
        connection = Connection(coordination.host, coordination.port, served_here=coordination.rank == 0)
        try:
            connection.open(ANSWER_SECS)
            # Most of what fails in the checkpoint process has been told by it.
            if connection.call(lambda store: is_decided_in(store, call.save_id), ANSWER_SECS):
                self._calls.told(call)
                return
            connection.call(lambda store: give_up_in(store, call.save_id, outcome), ANSWER_SECS)
            if coordination.rank != 0:
                connection.call(lambda store: hear_in(store, call.save_id, coordination.world_size), ANSWER_SECS)
            self._calls.told(call)
        except StoreUnreachableError as failure:
            _events.logger.info("could not tell the other ranks that %s: %s", outcome.reason, failure)
