"""Staging: copying a state dict to shared memory, so that training may go on while it is written."""

import abc
import mmap
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from lastgood import _events
from lastgood._snapshot import Snapshot, SnapshotFuture, read_layout
from lastgood._staging.arena_pool import ArenaPool
from lastgood._staging.job import StagingJob, StagingOptions, lay_out
from lastgood._staging.optimizer_guard import OptimizerGuard
from lastgood._staging.plan import Planner, arena_size
from lastgood._staging.state import rebuild_state
from lastgood._threads import start_daemon
from lastgood.errors import ConfigError, SaveTimeoutError
from lastgood.types import STATE_DICT

_LONGEST_TIMEOUT_SECS = 365 * 86400.0

Attached = TypeVar("Attached")


class NoAcceleratorError(ConfigError, AssertionError):
    """Something was asked for that only a machine with an accelerator can do."""


class CheckpointStager(abc.ABC):
    """Copies state dicts somewhere where training cannot change them."""

    @abc.abstractmethod
    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:
        """A copy of ``state_dict`` as it is now: the copy itself, or a future of it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the stager holds."""

    def __enter__(self) -> "CheckpointStager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@dataclass
class CheckpointStagerConfig:
    """How to stage. The first four default to what the machine has.

    ``use_pinned_memory``: pin the arena for copies from a CUDA device (ignored without one). ``use_shared_memory`` is
    taken for compatibility: the arena always is shared memory. ``use_async_staging``: copy in a background thread;
    otherwise ``stage`` returns when all is copied. ``use_non_blocking_copy``: queue copies from an accelerator without
    waiting for each (an :class:`AssertionError` where there is none).

    ``snapshots_in_flight``: how many snapshots may be staged or being written at a time; each takes memory of the
    state's size. ``slot_timeout_secs``: how long a save waits for an earlier one to be written when that many are in
    flight. ``staging_timeout_secs``: how long an optimizer's step waits for staging, and how long copying may stand
    still. ``hold_optimizers``: whether ``step()`` of optimizers waits while their tensors are being copied.
    ``full_check``: compare every byte instead of samples to find tensors that changed meanwhile; reads the whole state
    before ``stage`` returns.
    """

    use_pinned_memory: bool = field(default_factory=_has_cuda)
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = field(default_factory=_has_accelerator)
    _: KW_ONLY
    snapshots_in_flight: int = 1
    slot_timeout_secs: float = 3600.0
    staging_timeout_secs: float = 600.0
    hold_optimizers: bool = True
    full_check: bool = False


class DefaultStager(CheckpointStager):
    """Stages into shared memory laid out as the checkpoint file that it will become.

    The memory is reused from save to save, and so is the plan of it while the structure of the state stays the same.
    A snapshot is of the moment of the call: plain values are taken at once, small tensors are copied at once,
    optimizers wait until the others are copied, and a tensor that changed all the same fails the snapshot
    (:class:`~lastgood.errors.TornSnapshotError`). Several threads may call it; one state is staged at a time.
    """

    def __init__(self, config: CheckpointStagerConfig | None = None) -> None:
        self.config = config = CheckpointStagerConfig() if config is None else config
        _check(config)
        self._options = StagingOptions(config.staging_timeout_secs, config.full_check, config.use_non_blocking_copy)
        self._planner = Planner()
        self._taking = threading.Lock()
        self._queueing = threading.Lock()
        self._pool = ArenaPool(config.snapshots_in_flight, pinned=config.use_pinned_memory and _has_cuda())
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._guard: OptimizerGuard | None = None
        self._job: StagingJob | None = None
        self._is_closed = False

    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:
        """A copy of ``state_dict`` as it is at this moment, its tensors on the CPU.

        With asynchronous staging a future, whose result is built when somebody asks for it; a
        :class:`~lastgood.checkpoint_process.CheckpointProcess` takes the staged memory instead. ``kwargs`` are ignored.
        Raises :class:`~lastgood.errors.UnsupportedStateError` for a value that cannot be saved.
        """
        if self.config.use_async_staging:
            return self.stage_for(state_dict, lambda future: None)[0]
        snapshot = self.snapshot(state_dict)
        try:
            return _rebuild(snapshot)
        finally:
            snapshot.release()

    def snapshot(self, state_dict: STATE_DICT) -> Snapshot:
        """A snapshot that is staged when this returns, for whoever writes it and releases it then.

        Raises what staging failed with.
        """
        job = self._take(state_dict)
        self._run(job, caller_waits=True)
        if job.error is not None:
            job.snapshot.release()
            raise job.error
        return job.snapshot

    def stage_for(
        self, state_dict: STATE_DICT, attach: Callable[["StagedState"], Attached]
    ) -> tuple["StagedState", Attached]:
        """The future of a staged state, and what ``attach`` returns for it.

        ``attach`` is called before anything is staged in the background, so that whoever writes the snapshot has been
        told of it when the future resolves. When it raises, or staging cannot begin, nothing is staged.
        """
        job = self._take(state_dict)
        future = StagedState(job.snapshot)
        try:
            attached = attach(future)
            if self.config.use_async_staging:
                if self.config.hold_optimizers and self._guard is None:
                    self._guard = OptimizerGuard(self)
                self._run_later(partial(self._run_for, future, job))
            else:
                self._run_for(future, job, caller_waits=True)
        except BaseException as error:
            if not job.is_over:
                self._finish(job, error)
                future.resolve(error)
            raise
        return future, attached

    def _take(self, state_dict: STATE_DICT) -> StagingJob:
        """A job for the state as it is now, when no other is under way."""
        while True:
            self.wait_until_staged()
            with self._taking:
                self._require_open()
                current = self.current
                if current is not None and current.timed_out:
                    raise SaveTimeoutError(
                        f"the snapshot before this one has been in work for {self.config.staging_timeout_secs:g}"
                        " s and goes on; nothing of this one was staged, earlier checkpoints are untouched. Is the "
                        "machine swapping, or are its tensors mapped from a file that cannot be read?",
                        phase="stage",
                    )
                if current is not None:
                    continue  # of another thread
                with _events.phase("take", "the snapshot"):
                    taken = self._planner.take(state_dict)
                    arena = self._pool.find(taken.plan.number)
                    try:
                        job = StagingJob(state_dict, taken, arena, self._options, self._pool.give_back)
                    except BaseException:
                        self._pool.give_back(arena)
                        raise
                self._job = job
                return job

    def _run_for(self, future: "StagedState", job: StagingJob, *, caller_waits: bool = False) -> None:
        self._run(job, caller_waits=caller_waits)
        future.resolve(job.error)
        # A failure's traceback leads here: whoever keeps it must not keep the future, and so the arena.
        del future

    def _run(self, job: StagingJob, *, caller_waits: bool) -> None:
        error: BaseException | None = None
        try:
            with _events.phase("stage", "the snapshot"):
                size = job.prepare(self._planner, caller_waits=caller_waits)
                # It is the pool's until it is ready: one that cannot be made ready is closed there.
                arena, job.arena = job.arena, None
                job.arena = self._pool.make(size, arena)
                job.run()
        except BaseException as raised:
            error = raised
        self._finish(job, error)

    def _finish(self, job: StagingJob, error: BaseException | None) -> None:
        job.end(error)
        if self._job is job:
            self._job = None

    def prewarm(self, state_dict: STATE_DICT) -> Future[None]:
        """Get ready for saves of states like this one: plan, and memory reserved and touched, in the background.

        The first save is then as fast as later ones. The future resolves when it is done, or raises
        :class:`~lastgood.errors.ArenaMemoryError` when there is not enough memory.
        """
        self._require_open()
        done: Future[None] = Future()

        def prepare() -> None:
            try:
                with _events.phase("prewarm", "the snapshot"):
                    # Not by the planner of a snapshot that waits behind this: it would take over these plain values.
                    planner = Planner()
                    taken = planner.take(state_dict)
                    # Without the lock: this takes long, and saves go on meanwhile.
                    arena = self._pool.make(arena_size(taken.plan.describe()), None)
                    try:
                        with self._taking:
                            lay_out(arena, taken)
                            if self.current is None:
                                self._planner = planner
                    finally:
                        self._pool.give_back(arena)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._run_later(prepare)
        return done

    @property
    def current(self) -> StagingJob | None:
        """The staging whose tensors are being read at this moment."""
        job = self._job
        return None if job is None or job.is_over else job

    def wait_until_staged(self) -> None:
        """Return when tensors may be changed: nothing is being staged, or it has taken too long, and fails."""
        job = self.current
        if job is not None:
            with _events.phase("hold", "the snapshot"):
                job.wait()

    def close(self) -> None:
        """Wait for staging to end, and give the memory back once the snapshots in it are written. May be called again.

        Raises :class:`~lastgood.errors.SaveTimeoutError` when staging does not end in time.
        """
        with self._taking, self._queueing:
            if self._is_closed:
                return
            self._is_closed = True
            thread = self._thread
            self._jobs.put(None)
        try:
            if thread is not None:
                thread.join(self.config.staging_timeout_secs)
                if thread.is_alive():
                    raise SaveTimeoutError(
                        f"staging did not end within {self.config.staging_timeout_secs:g} s of closing; the save being "
                        "staged is lost, earlier checkpoints are untouched.",
                        phase="close",
                    )
        finally:
            if self._guard is not None:
                self._guard.remove()
        self._planner.forget()
        self._pool.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this stager has been closed; make another one")

    def _run_later(self, job: Callable[[], None]) -> None:
        """Do it on the staging thread; or at once, where the interpreter is ending and starts no threads any more."""
        with self._queueing:
            self._require_open()
            if self._thread is None:
                # The thread must not keep a stager alive that nobody closed.
                self._thread = start_daemon(partial(_work, self._jobs), name="lastgood-staging")
                if self._thread is not None:
                    weakref.finalize(self, self._jobs.put, None).atexit = False
            if self._thread is not None:
                self._jobs.put(job)
                return
        job()


def _work(jobs: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _check(config: CheckpointStagerConfig) -> None:
    if config.use_non_blocking_copy and not _has_accelerator():
        raise NoAcceleratorError(
            "use_non_blocking_copy=True needs an accelerator, and this machine has none: leave it out"
        )
    if config.snapshots_in_flight < 1:
        raise ConfigError(
            f"snapshots_in_flight is {config.snapshots_in_flight!r}; at least one is needed to save at all"
        )
    for name in ("slot_timeout_secs", "staging_timeout_secs"):
        if not 0 < getattr(config, name) <= _LONGEST_TIMEOUT_SECS:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it has to be above 0 s and at most a year")


class StagedState(SnapshotFuture):
    """The future of a staged state: resolved when staging is over; the state is built when it is asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.set_running_or_notify_cancel()
        self._building = threading.Lock()
        self._built: STATE_DICT | None = None

    def resolve(self, error: BaseException | None) -> None:
        """For the stager: staging is over."""
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> STATE_DICT:
        """The staged state, on memory of its own; the same object each time."""
        super().result(timeout)
        with self._building:
            if self._built is None:
                self._built = _rebuild(self.snapshot)
            return self._built


def _rebuild(snapshot: Snapshot) -> STATE_DICT:
    placement = snapshot.placed.result(0)
    memory = memoryview(mmap.mmap(placement.descriptor, placement.arena_size))
    state: STATE_DICT = rebuild_state(memory, read_layout(memory, placement.description), copy=True)
    return state
