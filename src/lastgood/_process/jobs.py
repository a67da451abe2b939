"""The saves that a checkpoint process has to do: one at a time, in the order in which they were asked for."""

import contextlib
import gc
import mmap
import os
import pickle
import threading
import traceback
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from lastgood import _events
from lastgood._process.parcels import Parcel, unpack
from lastgood._process.pipe import Received, RequestType, WorkerResponse, close_all
from lastgood._process.shared_tensors import put_shared_tensors
from lastgood._staged_image import StagedImage
from lastgood.checkpoint_writer import CheckpointWriter
from lastgood.errors import CheckpointProcessError, SaveTimeoutError, StagingError, StorageError

_WAIT_SECS = 60.0


class _Arena:
    """A trainer's arena: its memory, for as long as anybody looks at it.

    The trainer sends its descriptor once, and anew where it has grown. What cannot be mapped for one save is tried
    again for the next.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory: memoryview | None = None

    def memory(self, size: int) -> memoryview:
        """The arena, which has ``size`` bytes now. It may have had more when it was mapped."""
        if self._descriptor < 0:  # which mmap would take for memory that is nobody's
            raise ValueError("this arena was given up")
        if self._memory is None or len(self._memory) < size:
            self._memory = memoryview(mmap.mmap(self._descriptor, size))
        return self._memory

    def close(self) -> None:
        """No save will be read from it any more; what is being read stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class Job:
    """One save. ``problem`` is why it cannot even be tried."""

    number: int
    call: Parcel
    working_directory: str | None
    image: StagedImage | None
    shared: tuple[Parcel, list[int]] | None = None
    problem: Exception | None = None
    is_complete: bool = False


class JobQueue:
    """Filled by the thread that reads the pipe, emptied by the one that writes checkpoints."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._arenas: dict[int, _Arena] = {}
        self._is_leaving = False

    def take(self, received: Received) -> None:
        """Do what a request of the type WRITE_CHECKPOINT says. Does not wait."""
        payload = received.message.payload
        event = payload["event"]
        if event == "forget":
            self._forget(payload["arenas"])
        elif event == "begin":
            job = self._new_job(payload, received.descriptors)
            with self._changed:
                self._waiting.append(job)
                self._changed.notify_all()
        else:
            job_or_none = self._find(payload["save"])
            if job_or_none is not None:  # else it has failed here already
                _tell(job_or_none, event, payload)

    def _new_job(self, payload: dict[str, Any], descriptors: list[int]) -> Job:
        self._forget(payload["forget"])
        own = descriptors[1:] if payload["sends_arena"] else descriptors
        shared = None if payload["shared"] is None else (payload["shared"], own)
        job = Job(payload["save"], payload["call"], payload["working_directory"], None, shared)
        try:
            if payload["sends_arena"]:
                self._forget([payload["arena"]])  # the same at another size
                self._arenas[payload["arena"]] = _Arena(descriptors[0])
            memory = self._arenas[payload["arena"]].memory(payload["arena_size"])
            job.image = StagedImage(memory, payload["description"])
        except Exception as error:
            job.problem = error
        return job

    def _forget(self, arenas: list[int]) -> None:
        known = [self._arenas.pop(arena) for arena in arenas if arena in self._arenas]
        if known:
            # An image's worth of memory must not wait: not for a name here that still refers to it, nor for the
            # collector where tracebacks of a save do.
            while known:
                known.pop().close()
            gc.collect()

    def _find(self, number: int) -> Job | None:
        with self._changed:
            for job in (self._current, *self._waiting):
                if job is not None and job.number == number:
                    return job
        return None

    def next(self) -> Job | None:
        """Wait for the next save, the one before being finished; ``None`` when the process is to leave."""
        with self._changed:
            self._current = None
            while not self._waiting:
                if self._is_leaving:
                    return None
                self._changed.wait(_WAIT_SECS)
            self._current = self._waiting.popleft()
            return self._current

    def leave(self) -> None:
        """No more saves will come."""
        with self._changed:
            self._is_leaving = True
            self._changed.notify_all()

    def abandon_incomplete(self, error: Exception) -> None:
        """Fail what is not wholly staged, and never will be.

        What has not been begun stays in the queue: it fails when its turn comes, and the other ranks are told.
        """
        with self._changed:
            for job in (self._current, *self._waiting):
                if job is not None:
                    _abandon(job, error)

    @property
    def current(self) -> Job | None:
        with self._changed:
            return self._current

    @property
    def has_work(self) -> bool:
        with self._changed:
            return self._current is not None or bool(self._waiting)


def _tell(job: Job, event: str, payload: dict[str, Any]) -> None:
    if event == "complete":
        job.is_complete = True
    if job.image is None:
        return
    if event == "advance":
        job.image.advance(payload["staged"])
    elif event == "complete":
        job.image.complete()
    elif event == "fail":
        reason = f"the snapshot was given up by its trainer: {payload['reason']}. Nothing of it is published."
        job.image.fail(StagingError(reason, phase="stage"))


def _abandon(job: Job, error: Exception) -> None:
    if not job.is_complete and job.image is not None:
        job.image.fail(error)


class Writing:
    """Does jobs with one writer, and makes the answers."""

    def __init__(self, writer: Any, no_progress_timeout_secs: float) -> None:
        self._writer = writer
        self._timeout_secs = no_progress_timeout_secs
        self.takes_images = isinstance(writer, CheckpointWriter) and type(writer).write is CheckpointWriter.write
        """Whether it is lastgood's own way of writing, which needs no state dict and bounds its own waits."""

    def do(self, job: Job) -> WorkerResponse:
        """Write; whatever goes wrong is the answer, and this process lives on."""
        events: list[_events.Event] = []
        unsubscribe = _events.subscribe(events.append)
        try:
            self._write(job)
        except BaseException as error:
            return failed(RequestType.WRITE_CHECKPOINT, error, save=job.number, events=_portable(events))
        finally:
            unsubscribe()
        payload = {"save": job.number, "events": _portable(events)}
        return WorkerResponse(RequestType.WRITE_CHECKPOINT, True, payload=payload)

    def _write(self, job: Job) -> None:
        shared = self._shared_tensors(job)
        path, arguments = unpack(job.call, ())
        try:
            _enter(job.working_directory, path)
            image = _mapped(job, path)
            state = None if self.takes_images else image.load()
        except BaseException as error:
            if isinstance(self._writer, CheckpointWriter):
                self._writer.abandon(path, error, **arguments)  # the other ranks wait for this one
            raise
        if state is None:
            self._writer.write_staged(path, image, **arguments)
            return
        put_shared_tensors(state, shared)
        pending = self._writer.write(path=path, state_dict=state, **arguments)
        if isinstance(pending, Future):
            self._wait_for(pending, path)

    def _shared_tensors(self, job: Job) -> dict[Any, Any]:
        if job.shared is None:
            return {}
        parcel, descriptors = job.shared
        job.shared = None
        if self.takes_images:
            close_all(descriptors)
            return {}
        tensors: dict[Any, Any] = unpack(parcel, descriptors)
        return tensors

    def _wait_for(self, pending: "Future[Any]", path: object) -> None:
        try:
            pending.result(self._timeout_secs)
        except FutureTimeoutError:
            if pending.done():
                raise
            raise SaveTimeoutError(
                f"the writer's future of the save to {path} did not resolve within {self._timeout_secs:g} s "
                "(no_progress_timeout_secs); earlier checkpoints are untouched.",
                path=str(path),
                phase="write",
            ) from None


def _mapped(job: Job, path: object) -> StagedImage:
    if job.problem is not None or job.image is None:
        raise CheckpointProcessError(
            f"the checkpoint process {os.getpid()} could not map the memory of the snapshot for {path}: {job.problem}. "
            "Nothing was written, earlier checkpoints are untouched. Is its address space limited (ulimit -v)?",
            pid=os.getpid(),
            path=str(path),
            phase="write",
        ) from job.problem
    return job.image


def _enter(directory: str | None, path: object) -> None:
    """A relative path means what it meant in the trainer."""
    if directory is None:
        return
    try:
        os.chdir(directory)
    except OSError as error:
        if isinstance(path, (str, os.PathLike)) and os.path.isabs(path):
            return
        raise StorageError(
            f"the checkpoint process cannot enter {directory}, where the trainer was and {path} is meant to be: "
            f"{error.strerror}. Nothing was written, earlier checkpoints are untouched. Save to an absolute path.",
            errno=error.errno,
            path=str(path),
            phase="write",
        ) from error


def failed(request_type: RequestType, error: BaseException, **payload: Any) -> WorkerResponse:
    """The answer for something that raised: its words, and itself where it can travel."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(Exception):
        payload["error"] = pickle.dumps(error)
    return WorkerResponse(request_type, False, error_msg=text, payload=payload)


def _portable(events: list[_events.Event]) -> list[_events.Event]:
    return [_portable_event(event) for event in events]


def _portable_event(event: _events.Event) -> _events.Event:
    if event.error is None:
        return event
    try:
        pickle.loads(pickle.dumps(event.error))
        return event
    except Exception:
        error = CheckpointProcessError(f"{type(event.error).__name__}: {event.error}", pid=os.getpid())
        return _events.Event(event.phase, event.path, event.rank, event.seconds, event.nbytes, error)
