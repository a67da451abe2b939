"""What one rank of one save says to the store and asks of it, with errors that say what is still safe."""

from collections.abc import Callable, Sequence
from typing import Any

from lastgood._coordination.connection import Connection, StoreUnreachableError
from lastgood._coordination.meeting import Meeting, rank_list, wait_for
from lastgood.errors import BarrierTimeoutError

RANK_0_IS_GONE = "; rank 0's checkpoint process, or rank 0 itself, has ended or is cut off"


class Exchange:
    """Raises :class:`~lastgood.errors.BarrierTimeoutError` for all that keeps a rank from the others."""

    def __init__(
        self, connection: Connection, save_id: str, path: str, rank: int, world_size: int, timeout_secs: float
    ) -> None:
        self.timeout_secs = timeout_secs
        self.is_cut_off = False
        """Whether the store was lost: another one may be served at its address, which knows nothing of this save."""
        self._connection = connection
        self._save_id = save_id
        self._path = path
        self._rank, self._world_size = rank, world_size

    def open(self, timeout_secs: float) -> None:
        """Make sure that there is a connection."""
        try:
            self._connection.open(timeout_secs)
        except StoreUnreachableError as error:
            raise self._broken(error) from error

    def ask(self, use: Callable[[Any], Any], timeout_secs: float | None = None) -> Any:
        """What ``use`` makes of the store, within the save's time-out or another one."""
        try:
            return self._connection.call(use, self.timeout_secs if timeout_secs is None else timeout_secs)
        except StoreUnreachableError as error:
            raise self._broken(error) from error

    def came(self, key: str, timeout_secs: float | None = None) -> bool:
        """Wait until something is in the store; whether it came in time."""
        limit = self.timeout_secs if timeout_secs is None else timeout_secs
        return wait_for(lambda left: self.has(key, left), limit, self._world_size)

    def has(self, key: str, timeout_secs: float) -> bool:
        """Whether something is in the store, which gets so long to say it."""
        return bool(self.ask(lambda store: store.check([key]), timeout_secs))

    def meeting(self, store: Any) -> Meeting:
        """That of all ranks for this save."""
        return Meeting(store, save_prefix(self._save_id), self._rank, self._world_size)

    def key(self, *what: object) -> str:
        """The name of something that belongs to this save."""
        return "/".join(map(str, (save_prefix(self._save_id), *what)))

    def error(self, reason: str, missing: Sequence[int]) -> BarrierTimeoutError:
        """Why the save failed, and whose log tells more."""
        where = f" Look at the log of {rank_list(missing)}." if missing and tuple(missing) != (self._rank,) else ""
        return BarrierTimeoutError(
            f"rank {self._rank} could not commit the checkpoint {self._path} of {self._world_size} ranks with the "
            f"others: {reason.rstrip('.')}. The checkpoint is not committed, unless its manifest is there; "
            f"earlier ones are untouched.{where}",
            missing_ranks=tuple(missing),
            path=self._path,
            rank=self._rank,
            phase="commit",
        )

    def _broken(self, error: StoreUnreachableError) -> BarrierTimeoutError:
        self.is_cut_off = True
        return self.error(f"{error}{RANK_0_IS_GONE}", (0,))


def save_prefix(save_id: str) -> str:
    """What the names of all that belongs to a save begin with."""
    return f"save/{save_id}"
