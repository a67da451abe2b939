"""What a rank knows of a save before it begins: its id, which all ranks find by themselves, and the job's epoch.

torch is not imported here.
"""

import hashlib
import os
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass

from lastgood.format.epoch import Epoch, check_epoch, take_epoch
from lastgood.storage.base import StorageBackend

_PATHS_REMEMBERED = 4096


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

    ``former`` are ids of saves that are over: what they have left in the store may go. ``failed`` are those that have
    failed on this rank, each with the reason, and that the others may not know of.
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
            call = SaveCall(digest.hexdigest()[:32], None, self._last)
            self._last = (call.save_id,)
            return call


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
