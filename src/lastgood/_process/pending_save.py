"""One save on its way through the checkpoint process, as the trainer sees it."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lastgood._futures import ObservedFuture
from lastgood._process.parcels import Parcel
from lastgood._process.pipe import RequestType, WorkerRequest, close_all
from lastgood._snapshot import Placement, Snapshot


class Post(Protocol):
    """Sends a request in the order of the calls, without waiting. It takes the descriptors over."""

    def __call__(
        self, request: WorkerRequest, /, descriptors: Sequence[int] = (), sent: Callable[[], None] | None = None
    ) -> None: ...


class PendingSave:
    """Observes its snapshot, passes on what it hears once the save's turn has come, and releases it at the end.

    ``future`` resolves when the checkpoint process has answered, or when it is known that it will not.
    """

    def __init__(
        self,
        number: int,
        path: object,
        working_directory: str | None,
        complete_timeout_secs: float,
        ended: Callable[["PendingSave"], None],
    ) -> None:
        self.number = number
        self.path = str(path)
        self.future: ObservedFuture[None] = ObservedFuture()
        self.call: Parcel | None = None
        """The path and the keyword arguments, as they were when the save was asked for."""
        self.shared: tuple[Parcel, list[int]] | None = None
        self._working_directory = working_directory
        self._call_when_ended = ended
        self._complete_timeout_secs = complete_timeout_secs
        self._lock = threading.Lock()
        self._post: Post | None = None
        self._snapshot: Snapshot | None = None
        self._placement: Placement | None = None
        self._arena_descriptor = -1
        self._staged = 0
        self._staging_ended = False
        self._staging_failure: BaseException | None = None
        self._told = threading.Event()
        self._ended = False
        self._reusable = True

    @property
    def is_ready(self) -> bool:
        """Its turn may come: it can be sent, or it has ended already."""
        with self._lock:
            return self._ended or self._placement is not None

    @property
    def is_ended(self) -> bool:
        with self._lock:
            return self._ended

    @property
    def placement(self) -> Placement:
        assert self._placement is not None, "a save is sent only when it is ready"
        return self._placement

    def attach(self, snapshot: Snapshot) -> None:
        """From now on the snapshot is released at the end, whatever happens. To be observed next."""
        with self._lock:
            self._snapshot = snapshot

    def place(self, placement: Placement) -> None:
        """The layout is fixed; the arena's descriptor is good now, and a copy of it will be later."""
        descriptor = os.dup(placement.descriptor)
        with self._lock:
            if not self._ended:
                self._arena_descriptor, descriptor = descriptor, -1
                self._placement = placement
        if descriptor >= 0:
            os.close(descriptor)

    def begin(self, post: Post, claim_arena: Callable[[Placement], tuple[bool, list[int]]]) -> bool:
        """Its turn has come: ask for the write, and pass on from now on how staging goes. ``False``: it has ended.

        ``claim_arena`` says whether the process needs the arena's descriptor, and which arenas it should let go of.
        """
        placement = self.placement
        with self._lock:
            if self._ended:
                return False
            sends_arena, forget = claim_arena(placement)
            arena, self._arena_descriptor = self._arena_descriptor, -1
            shared, self.shared = self.shared, None
            descriptors = [arena] if sends_arena else []
            if not sends_arena:
                os.close(arena)
            payload: dict[str, Any] = {
                "arena": placement.arena,
                "arena_size": placement.arena_size,
                "sends_arena": sends_arena,
                "forget": forget,
                "description": placement.description,
                "call": self.call,
                "shared": None if shared is None else shared[0],
                "working_directory": self._working_directory,
            }
            post(self._request("begin", **payload), [*descriptors, *([] if shared is None else shared[1])])
            self._post = post
            if self._staged:
                post(self._request("advance", staged=self._staged))
            if self._staging_ended:
                self._pass_on_ending()
            return True

    def advance(self, staged: int) -> None:
        with self._lock:
            self._staged = staged
            if self._post is not None and not self._ended:
                self._post(self._request("advance", staged=staged))

    def complete(self) -> None:
        self._end_staging(None)
        # Who learns from the stage future that all is staged may be killed at once: the process has to know by then.
        self._told.wait(self._complete_timeout_secs)

    def fail(self, error: BaseException) -> None:
        if self._end_staging(error):
            self.end(error)

    def _end_staging(self, failure: BaseException | None) -> bool:
        """Whether the save ends with that, because the process has never heard of it."""
        with self._lock:
            self._staging_ended = True
            self._staging_failure = failure
            unused = self._take_snapshot() if self._ended else None
            if self._post is not None and not self._ended:
                self._pass_on_ending()
            ends = failure is not None and self._post is None and not self._ended
        if unused is not None:
            unused.release(reusable=self._reusable)
        return ends

    def _take_snapshot(self) -> Snapshot | None:
        snapshot, self._snapshot = self._snapshot, None
        return snapshot

    def _pass_on_ending(self) -> None:
        assert self._post is not None
        if self._staging_failure is None:
            self._post(self._request("complete"), sent=self._told.set)
        else:
            reason = f"{type(self._staging_failure).__name__}: {self._staging_failure}"
            self._post(self._request("fail", reason=reason))

    def _request(self, event: str, **payload: Any) -> WorkerRequest:
        return WorkerRequest(RequestType.WRITE_CHECKPOINT, {"save": self.number, "event": event, **payload})

    def end(self, error: BaseException | None, *, reusable: bool = True) -> None:
        """The process reads the snapshot no more (or never will). Only the first call counts.

        ``reusable=False``: it could not be stopped, and may still be reading.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._reusable = reusable
            # A snapshot that is still being staged is released by the end of its staging.
            unused = self._take_snapshot() if self._staging_ended else None
            if self._staging_failure is not None:
                error = self._staging_failure
            descriptors = [self._arena_descriptor, *([] if self.shared is None else self.shared[1])]
            self._arena_descriptor, self.shared = -1, None
        close_all([descriptor for descriptor in descriptors if descriptor >= 0])
        self._told.set()
        # First the room for the next snapshot: whoever waits for this save may ask for one at once.
        if unused is not None:
            unused.release(reusable=reusable)
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)
        self._call_when_ended(self)

    def staging_never_began(self, error: BaseException) -> None:
        """The snapshot could not be made or placed: there will be no report of how its staging ended."""
        with self._lock:
            self._staging_ended = True
            self._staging_failure = self._staging_failure or error
        self.end(error)
