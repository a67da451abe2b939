"""A snapshot on its way from the trainer's memory to storage: what the stager fills and the checkpoint process writes.

Nothing here knows how bytes get into the arena or out of it. The stager resolves :attr:`Snapshot.placed` and reports
to the observers; whoever writes the snapshot observes it, and gives it back by :meth:`Snapshot.release`.
"""

import array
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from lastgood.format.image import DataLayout, lay_out_data


class ImageDescription(msgspec.Struct, frozen=True):
    """What has to be known of a file image in an arena to finish and write it. All offsets and sizes are in bytes.

    ``plan`` numbers the layout: two descriptions of one process with the same number have the same pickle size and
    the same storages. The storages' sizes stand in the arena as unsigned 64-bit numbers in native byte order, the
    body of the index (its JSON after the members that name the save) as it is.
    """

    plan: int
    pickle_size: int
    byteorder: str
    storage_count: int
    storage_sizes_offset: int
    index_body_offset: int
    index_body_size: int
    replica_count: int
    """How many replicas there are: their CRC-32s follow the index body, four bytes each, once the snapshot is whole."""
    image_capacity: int
    """How much room the finished image has, from the arena's first byte on."""


def replica_checks_at(description: ImageDescription) -> tuple[int, int]:
    """Where in an arena the checksums of replicas begin and end."""
    start = description.index_body_offset + description.index_body_size
    return start, start + 4 * description.replica_count


def read_layout(memory: memoryview, description: ImageDescription) -> DataLayout:
    """Where the pickle and the storages stand in the image at the beginning of an arena."""
    sizes = array.array("Q")
    start = description.storage_sizes_offset
    sizes.frombytes(memory[start : start + description.storage_count * sizes.itemsize])
    return lay_out_data(description.pickle_size, len(description.byteorder), sizes)


class Placement(msgspec.Struct, frozen=True):
    """Where a snapshot stands: an arena (its number is never used again in this process), and what is in it."""

    descriptor: int
    arena: int
    arena_size: int
    description: ImageDescription


class Observer(Protocol):
    """Told how staging goes, by one thread at a time: ``advance`` any number of times, then one of the others."""

    def advance(self, staged: int) -> None:
        """The first ``staged`` bytes of the image are there. Must not wait for anything."""

    def complete(self) -> None:
        """All bytes are there and were found unchanged since the snapshot was asked for.

        The stage future resolves after this has returned: it may wait, within a time-out of its own.
        """

    def fail(self, error: BaseException) -> None:
        """Staging failed: the image must never be published. Must not wait for anything."""


class Snapshot:
    """One snapshot, from the call that asked for it until its arena may be used again.

    ``give_back`` is called once, when nobody needs the arena for this snapshot any more, with whether it may be written
    again.
    """

    def __init__(self, give_back: Callable[[bool], None]) -> None:
        self.placed: Future[Placement] = Future()
        """Resolves once the arena has been reserved and the layout is fixed, or with what staging failed with."""
        # Reentrant: the garbage collector may end an owner while its thread is in here.
        self._lock = threading.RLock()
        self._give_back: Callable[[bool], None] | None = give_back
        self._is_released = False
        self._reusable = True
        self._owners = 0
        self._observers: list[Observer] = []
        self._staged = 0
        self._ending: Callable[[Observer], None] | None = None

    def observe(self, observer: Observer) -> None:
        """Report to ``observer`` from now on; what happened before is told at once, by the calling thread.

        Whoever observes calls :meth:`release` at the end.
        """
        with self._lock:
            self._observers.append(observer)
            if self._staged:
                observer.advance(self._staged)
            ending = self._ending
        if ending is not None:
            ending(observer)

    def report_progress(self, staged: int) -> None:
        """For the stager: the first ``staged`` bytes are there."""
        with self._lock:
            self._staged = staged
            for observer in self._observers:
                observer.advance(staged)

    def report_end(self, error: BaseException | None) -> None:
        """For the stager: staging is over. Returns once all observers know."""

        def tell(observer: Observer) -> None:
            if error is None:
                observer.complete()
            else:
                observer.fail(error)

        with self._lock:
            self._ending = tell
            observers = list(self._observers)
        for observer in observers:
            tell(observer)

    def keep_for(self, owner: object) -> None:
        """Do not give the arena back while ``owner`` is alive; it counts as released then if nobody observes it."""
        with self._lock:
            self._owners += 1
        weakref.finalize(owner, self._owner_is_gone).atexit = False

    def _owner_is_gone(self) -> None:
        with self._lock:
            self._owners -= 1
            if not self._observers:
                self._is_released = True
        self._give_back_if_unused()

    def release(self, *, reusable: bool = True) -> None:
        """Nobody writes from the arena for this snapshot any more. Further calls do nothing.

        ``reusable=False``: somebody who cannot be stopped may still be reading; the arena must not be written again.
        """
        with self._lock:
            self._is_released = True
            self._reusable = self._reusable and reusable
        self._give_back_if_unused()

    def _give_back_if_unused(self) -> None:
        with self._lock:
            if not self._is_released or self._owners:
                return
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self._reusable)


class SnapshotFuture(Future[Any]):
    """The future that asynchronous staging returns; whoever knows it takes the snapshot instead of its result."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self.snapshot = snapshot
        snapshot.keep_for(self)
