"""Checkpointers: what a training script calls."""

import abc
import atexit
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lastgood import _events
from lastgood._coordination.calls import SaveCall
from lastgood._coordination.trainer import TrainerVotes
from lastgood._events import logger
from lastgood._futures import ObservedFuture
from lastgood.checkpoint_process import CheckpointProcess
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import SAVE_CALL, CheckpointWriter
from lastgood.errors import ConfigError, SaveTimeoutError, require_all
from lastgood.sharding.divide import Divider
from lastgood.staging import CheckpointStager, CheckpointStagerConfig, DefaultStager
from lastgood.types import STATE_DICT
from lastgood.utils import wrap_future

_MOMENT_SECS = 10.0
_LONGEST_WRITE_SECS = 3600.0
"""How long a synchronous save waits for a writer of the user's own that returns a future."""


class Checkpointer(abc.ABC):
    """Saves and loads state dicts under paths."""

    @abc.abstractmethod
    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> tuple[Future[None], Future[None]] | None:
        """Save ``state_dict`` at ``path``.

        Synchronous: ``None``, once the checkpoint is durable. Asynchronous: two futures, of staging and of the write.
        """

    @abc.abstractmethod
    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load from ``path``: everything, or just the keys of ``state_dict``, into its tensors in place."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the checkpointer holds."""


class _ReadingCheckpointer(Checkpointer):
    """What all checkpointers have in common: loading waits for nothing but the reader."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load what was saved at ``path``, verified.

        With ``state_dict``, only its keys are read, into its tensors in place, and the same dict is returned; with
        ``strict=True``, :class:`~lastgood.errors.MissingKeysError` (a ``RuntimeError``) names those that are missing,
        after the others have been loaded. ``kwargs`` reach the reader: see :meth:`CheckpointReader.read`.
        """
        loaded, missing = self._reader.read(
            path=path, state_dict=state_dict, map_location=default_map_location, **kwargs
        )
        return require_all(loaded, missing, path, strict=strict)


class SyncCheckpointer(_ReadingCheckpointer):
    """Saves before it returns: no process, no shared memory, a bounded amount of memory whatever the state's size."""

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        super().__init__(reader)
        self._writer = writer

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Save ``state_dict`` at ``path``; when this returns, the checkpoint survives a power cut.

        ``kwargs`` reach the writer's hooks. See :meth:`CheckpointWriter.write` for the order of things and the errors.
        """
        pending = self._writer.write(path=path, state_dict=state_dict, **kwargs)
        if pending is not None:
            # A writer of the user's own that goes on in the background: durable is what its future says.
            pending.result(_LONGEST_WRITE_SECS)

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


@dataclass(frozen=True)
class _Save:
    """One save, as its caller sees it."""

    path: str
    staged: ObservedFuture[None]
    written: ObservedFuture[None]

    def unfetched_failure(self) -> BaseException | None:
        """Why it failed, if nobody has asked either future."""
        if self.staged.failure_was_fetched or self.written.failure_was_fetched:
            return None
        return self.written.unfetched_failure()


class AsyncCheckpointer(_ReadingCheckpointer):
    """Saves in the background: ``save`` returns as soon as the state cannot be changed by training any more.

    The state is copied to shared memory by ``checkpoint_stager`` and written by ``checkpoint_process``, which also
    finishes what was staged when this process dies. At the interpreter's exit, checkpointers that nobody closed are
    closed. ``may_write`` is asked about each path before anything is staged, and raises if a save there cannot succeed.
    ``votes`` speak for this rank where several commit together by voting: a save that fails here fails on all of them.
    ``divider`` takes this rank's part of what is spread over ranks.
    """

    def __init__(
        self,
        checkpoint_stager: CheckpointStager,
        checkpoint_process: CheckpointProcess,
        reader: CheckpointReader,
        *,
        may_write: Callable[[str], None] | None = None,
        votes: TrainerVotes | None = None,
        divider: Divider | None = None,
    ) -> None:
        super().__init__(reader)
        self._votes = votes
        self._divider = divider
        self._raises_earlier_failures = True
        self._checkpoint_stager = checkpoint_stager
        self._checkpoint_process = checkpoint_process
        self._may_write = may_write
        config = checkpoint_stager.config if isinstance(checkpoint_stager, DefaultStager) else _ONE_AT_A_TIME
        self._snapshots_in_flight = config.snapshots_in_flight
        self._slot_timeout_secs = config.slot_timeout_secs
        self._saves: list[_Save] = []
        self._saving = threading.Lock()
        self._saver: int | None = None
        self._is_closed = False
        _close_at_exit(self)

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> tuple[Future[None], Future[None]]:
        """Begin to save ``state_dict`` as it is at this moment; returns two futures that resolve to ``None``.

        The first resolves when the state has been staged: from then on the checkpoint survives the death of this
        process. The second resolves when the checkpoint survives a power cut. Optimizers' steps wait for the first by
        themselves; wrap any other change of the state in :meth:`hold`, or wait for it. If a tensor changed all the
        same, both raise :class:`~lastgood.errors.TornSnapshotError` and nothing is published.

        When as many snapshots are in flight as the configuration allows, waits for the oldest to be written
        (:class:`~lastgood.errors.SaveTimeoutError`). When an earlier save failed and nobody has got its failure from
        its futures, raises that, once, and does nothing else. ``kwargs`` reach the writer's hooks. Saves land in the
        order in which they were asked for.
        """
        votes = self._votes
        if votes is None:
            save = self._save(path, state_dict, kwargs, None)
            return save.staged, save.written
        call = votes.new_call(path)
        try:
            save = self._save(path, state_dict, kwargs, call)
        except BaseException as error:
            votes.give_up(call, error)
            raise
        return save.staged, save.written

    def _save(self, path: str, state_dict: STATE_DICT, kwargs: dict[str, Any], call: SaveCall | None) -> _Save:
        with self._alone(self._slot_timeout_secs), _events.phase("stall", path):
            if self._is_closed:
                raise ConfigError("this checkpointer has been closed; make another one", path=path)
            self._wait_for_slot(path)
            self._raise_unfetched_failure()
            if self._may_write is not None:
                self._may_write(path)
            passed_on: dict[str, Any] = {}
            if self._votes is not None and call is not None:
                call = self._votes.with_epoch(call, path)
                passed_on[SAVE_CALL] = call
            staged, written = self._begin(path, state_dict, kwargs, passed_on)
            if self._votes is not None and call is not None:
                # Before anybody is told: the save that waits for this one has to know how it ended.
                self._votes.watch(call, written)
            save = _Save(path, _observed(staged), _observed(written))
            self._saves.append(save)
            self._keep_until_known(save)
        return save

    @contextmanager
    def _alone(self, timeout_secs: float) -> Iterator[None]:
        """One call at a time. A signal handler that interrupts a save of its own thread cannot wait for that."""
        if self._saver == threading.get_ident():
            raise ConfigError(
                "save() or close() was called in the middle of a save of the same thread, by a signal handler or a "
                "garbage collector's callback; set a flag there, and save when the loop sees it"
            )
        if not self._saving.acquire(timeout=timeout_secs):
            raise SaveTimeoutError(f"another thread has been saving for {timeout_secs:g} s and goes on", phase="save")
        self._saver = threading.get_ident()
        try:
            yield
        finally:
            self._saver = None
            self._saving.release()

    def _keep_until_known(self, save: _Save) -> None:
        """A script may let go of its checkpointer, but then nobody would say at its exit that this save has failed."""
        _unknown[save] = self

        def forget(_: Future[None]) -> None:
            if save.unfetched_failure() is None:
                _unknown.pop(save, None)

        save.written.add_done_callback(forget)

    def _begin(
        self, path: str, state_dict: STATE_DICT, kwargs: dict[str, Any], passed_on: dict[str, Any]
    ) -> tuple[Any, Any]:
        """``passed_on`` goes to the checkpoint process, which keeps it from the hooks."""
        stager, process, arguments = self._checkpoint_stager, self._checkpoint_process, {**kwargs, **passed_on}
        state_dict = self._own_part(state_dict)
        # A stage() that somebody has put in its place is what counts.
        if isinstance(stager, DefaultStager) and getattr(stager.stage, "__func__", None) is DefaultStager.stage:
            return stager.stage_for(state_dict, lambda staged: process.write(staged, path, **arguments))
        staged = stager.stage(state_dict, **kwargs)
        return staged, process.write(staged, path, **arguments)

    def _wait_for_slot(self, path: str) -> None:
        in_flight = [save for save in self._saves if not save.written.done()]
        if len(in_flight) < self._snapshots_in_flight:
            return
        oldest = in_flight[0]
        with _events.phase("wait for slot", path):
            done, _ = concurrent.futures.wait([oldest.written], self._slot_timeout_secs)
        if not done:
            raise SaveTimeoutError(
                f"the save to {path} waited {self._slot_timeout_secs:g} s for that to {oldest.path} to be written, and "
                "gave up; nothing of it was staged. Is the storage too slow for how often you save? (slot_timeout_secs "
                "and snapshots_in_flight of CheckpointStagerConfig say how long to wait, and for what.)",
                path=path,
                phase="wait for slot",
            )

    def _raise_unfetched_failure(self) -> None:
        """Raise the oldest failure that nobody knows of; each is raised once."""
        ended = [save for save in self._saves if save.written.done()]
        for save in ended:
            self._saves.remove(save)
            _unknown.pop(save, None)
            failure = save.unfetched_failure()
            if failure is not None and self._raises_earlier_failures:
                raise failure

    def _own_part(self, state_dict: STATE_DICT) -> STATE_DICT:
        return state_dict if self._divider is None else self._divider.divide(state_dict)

    def leave_failures_to_futures(self) -> None:
        """For whoever looks at every future: no ``save`` raises what an earlier one failed with."""
        self._raises_earlier_failures = False

    def prewarm(self, state_dict: STATE_DICT) -> Future[None]:
        """Get ready to save states like this one, in the background: the first save is then as fast as later ones."""
        if isinstance(self._checkpoint_stager, DefaultStager):
            return self._checkpoint_stager.prewarm(self._own_part(state_dict))
        return wrap_future(None)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """For changes of the state that are no optimizer's step: the block begins when nothing is being staged."""
        if isinstance(self._checkpoint_stager, DefaultStager):
            self._checkpoint_stager.wait_until_staged()
        else:
            concurrent.futures.wait([save.staged for save in self._saves], self._slot_timeout_secs)
        yield

    def close(self) -> None:
        """Wait until all saves are written, and end the checkpoint process. May be called again.

        Raises the failure of a save that nobody has got from its futures, after everything has been closed; and
        :class:`~lastgood.errors.SaveTimeoutError` when saves take longer than ``close_timeout_secs``: the checkpoint
        process is left to finish them.
        """
        with self._alone(self._slot_timeout_secs):
            if self._is_closed:
                return
            self._is_closed = True
        try:
            self._checkpoint_stager.close()
        finally:
            self._close_process()
        for save in self._saves:
            _unknown.pop(save, None)
        failures = [failure for save in self._saves if (failure := save.unfetched_failure()) is not None]
        for failure in failures[1:]:
            logger.error("another save failed, too: %s", failure)
        if failures:
            raise failures[0]

    def _close_process(self) -> None:
        try:
            self._checkpoint_process.close()
        finally:
            # What the process knows reaches the futures a moment later.
            concurrent.futures.wait([save.written for save in self._saves], _MOMENT_SECS)
            if self._votes is not None:
                self._votes.close()


_unknown: dict[_Save, AsyncCheckpointer] = {}
"""The checkpointers of saves that have not ended yet, or whose failure nobody has asked for: kept until the exit."""

_ONE_AT_A_TIME = CheckpointStagerConfig(use_non_blocking_copy=False)
"""For stagers of the user's own."""


def _observed(result: Any) -> ObservedFuture[None]:
    """A future of whether ``result`` went well, that knows whether its failure was fetched."""
    observed: ObservedFuture[None] = ObservedFuture()

    def pass_on(done: Future[None]) -> None:
        error = done.exception()
        if error is None:
            observed.set_result(None)
        else:
            observed.set_exception(error)

    wrap_future(result).add_done_callback(pass_on)
    return observed


def _close_at_exit(checkpointer: AsyncCheckpointer) -> None:
    """A script that ends without waiting gets its last checkpoint all the same."""
    process = os.getpid()

    def close() -> None:
        kept = reference()
        if kept is None or os.getpid() != process:
            return
        try:
            kept.close()
        except Exception:
            logger.exception("a save that nobody waited for failed; its checkpoint is not there")

    reference = weakref.ref(checkpointer)
    # Made first, so that this is called before all finalizers at exit: they must not meet threads that still work.
    weakref.finalize(checkpointer, atexit.unregister, close).atexit = False
    atexit.register(close)
