"""What a rank knows of a save before it begins: its id, which all ranks find by themselves, and the job's epoch.

torch is not imported here.
"""

import dataclasses
import hashlib
import os
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass

from lastgood.format.epoch import Epoch, check_epoch, take_epoch
from lastgood.storage.base import StorageBackend

_PATHS_REMEMBERED = 4096
_FAILURES_REMEMBERED = 64


@dataclass(frozen=True)
class Coordination:
    """Where the ranks of one checkpointer meet, the same for all; only rank 0 has the ``listener``.

    ``job`` is what the epoch of a root is taken for: all checkpointers of one process group share it. ``series`` is one
    checkpointer's own. To be passed on to a checkpoint process it has to be pickled with descriptors.
    """

    rank: int
    world_size: int
    host: str
    port: int
    job: str
    series: str
    listener: socket.socket | None = None

    def close(self) -> None:
        """Let go of the socket. What serves it has a copy of its own."""
        if self.listener is not None:
            self.listener.close()


@dataclass(frozen=True)
class SaveCall:
    """One save, as it was asked for. ``epoch`` is known to rank 0 alone, which tells the others.

    ``former`` are ids of saves that are over: what they have left in the store may go. ``failed`` are those of which
    this rank could not tell the others, each with the reason.
    """

    save_id: str
    epoch: Epoch | None = None
    former: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


class SaveCalls:
    """Counts the saves that this rank asks for; all ranks count alike, and so find the same ids without talking."""

    def __init__(self, coordination: Coordination) -> None:
        self._series = coordination.series
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler may save in the middle of a save
        self._last: tuple[str, ...] = ()
        self._failed: OrderedDict[str, str] = OrderedDict()

    def new(self, path: str) -> SaveCall:
        """The next save to ``path``. Whatever happens then, it has been asked for: a rank that fails counts too."""
        where = os.path.abspath(path)
        with self._lock:
            # The oldest are forgotten: nobody saves to thousands of paths in turn.
            count = self._counts.pop(where, 0)
            self._counts[where] = count + 1
            if len(self._counts) > _PATHS_REMEMBERED:
                self._counts.popitem(last=False)
            digest = hashlib.sha256("\0".join((self._series, where, str(count))).encode(errors="surrogateescape"))
            call = SaveCall(digest.hexdigest()[:32], None, self._last, tuple(self._failed.items()))
            self._last = (call.save_id,)
            return call

    def could_not_tell(self, call: SaveCall, reason: str) -> None:
        """The save has failed here: until the others have been told, each call takes the news along."""
        with self._lock:
            self._failed[call.save_id] = reason
            if len(self._failed) > _FAILURES_REMEMBERED:
                self._failed.popitem(last=False)

    def told(self, call: SaveCall) -> None:
        """The others know that this save has failed."""
        with self._lock:
            self._failed.pop(call.save_id, None)

    def with_news(self, call: SaveCall) -> SaveCall:
        """The call with what else has failed by now: saves that were under way when it was made, or that failed in the
        process it has come to."""
        with self._lock:
            failed = tuple((dict(call.failed) | self._failed).items())
        return call if failed == call.failed else dataclasses.replace(call, failed=failed)

    def went_well(self, call: SaveCall) -> None:
        """What this call took along has arrived."""
        with self._lock:
            for save_id, _ in call.failed:
                self._failed.pop(save_id, None)


_held: dict[tuple[str, str], Epoch] = {}
_holding = threading.Lock()


def hold_epoch(storage: StorageBackend, root: str, job: str, timeout_secs: float, *, look: bool) -> Epoch:
    """This job's epoch under ``root``: taken the first time, and never a second time in this process.

    With ``look``, raises :class:`~lastgood.errors.SupersededError` if another job has taken over since. (Every save
    looks again, when it is about to publish.)
    """
    key = (job, os.path.realpath(root))
    with _holding:
        held = _held.get(key)
        if held is None:
            held = _held[key] = Epoch(take_epoch(storage, root, job, timeout_secs), job)
            return held
    if look:
        check_epoch(storage, root, held)
    return held


def root_of(path: str) -> str:
    """The directory that a checkpoint's directory stands in."""
    return os.path.dirname(path.rstrip(os.sep))
