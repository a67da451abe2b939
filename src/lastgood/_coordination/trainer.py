"""The trainer's part in the saves that its checkpoint process makes: it asks for them, and says so when one fails."""

import dataclasses
from concurrent.futures import Future

from lastgood._coordination.calls import Coordination, SaveCall, SaveCalls, hold_epoch, root_of
from lastgood._coordination.failures import FailedSaves, given_up_by
from lastgood.errors import BarrierTimeoutError, SupersededError
from lastgood.storage.base import StorageBackend

_TOLD = (BarrierTimeoutError, SupersededError)
"""What a checkpoint process raises once it has told the others, or while it goes on trying to."""


class TrainerVotes:
    """One rank's, for one checkpointer. Nothing here keeps the training loop waiting for another rank."""

    def __init__(
        self,
        coordination: Coordination,
        storage: StorageBackend,
        *,
        no_progress_timeout_secs: float,
        write_barrier_timeout_secs: float,
    ) -> None:
        self._coordination = dataclasses.replace(coordination, listener=None)
        self._calls = SaveCalls(coordination)
        self._failures = FailedSaves(coordination, write_barrier_timeout_secs)
        self._storage = storage
        self._no_progress_timeout_secs = no_progress_timeout_secs

    def new_call(self, path: object) -> SaveCall:
        """To be asked for before anything of a save can fail."""
        return self._calls.new(str(path))

    def with_epoch(self, call: SaveCall, path: object) -> SaveCall:
        """The call as it goes to the checkpoint process, when those before it are over: with what has failed of them,
        and on rank 0 with the job's epoch, taken at the first save."""
        call = self._failures.with_news(call)
        if self._coordination.rank != 0:
            return call
        root = root_of(str(path))
        epoch = hold_epoch(self._storage, root, self._coordination.job, self._no_progress_timeout_secs, look=False)
        return dataclasses.replace(call, epoch=epoch)

    def watch(self, call: SaveCall, written: "Future[None]") -> None:
        """If this write fails, the others shall know, whatever became of the checkpoint process."""

        def ended(done: "Future[None]") -> None:
            error = done.exception()
            if error is None:
                self._failures.arrived(call)
            elif isinstance(error, _TOLD):
                # What it told is lost if it dies now, or rank 0's does.
                self._failures.note(call, given_up_by(self._coordination.rank, error))
            else:
                self.give_up(call, error)

        written.add_done_callback(ended)

    def give_up(self, call: SaveCall, error: BaseException) -> None:
        """Tell the others, in the background."""
        self._failures.tell(call, given_up_by(self._coordination.rank, error))

    def close(self) -> None:
        """Before the training ends: returns once the others know what has failed here, or cannot be told."""
        self._failures.close()
