"""The process that writes checkpoints in the background, as the training process sees it."""

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from lastgood import _events
from lastgood._futures import ObservedFuture
from lastgood._process.child_process import ProcessHandle
from lastgood._process.launch import CheckpointProcessConfig, new_launch
from lastgood._process.link import ProcessLink
from lastgood._process.parcels import Parcel, pack, refuse_while_main_is_imported
from lastgood._process.pending_save import PendingSave
from lastgood._process.pipe import RequestType, WorkerRequest, WorkerResponse, close_all
from lastgood._process.shared_tensors import find_shared_tensors
from lastgood._snapshot import Placement, Snapshot, SnapshotFuture
from lastgood._threads import start_or_do
from lastgood.errors import CheckpointProcessError, ConfigError, SaveTimeoutError
from lastgood.types import STATE_DICT, RankInfo

__all__ = [
    "CheckpointProcess",
    "CheckpointProcessConfig",
    "RequestType",
    "WorkerRequest",
    "WorkerResponse",
    "default_subprocess_init_fn",
]

_KILL_SECS = 10.0


def default_subprocess_init_fn(*arguments: Any) -> None:
    """Prepares nothing in the checkpoint process."""


class CheckpointProcess:
    """Writes checkpoints from shared memory, in a process that survives failed saves and the trainer's death.

    The process is started in the background. It calls ``subprocess_init_fn(*subprocess_init_args)``, then makes the
    writer by ``checkpoint_writer_init_fn(**checkpoint_writer_init_args)``, with ``rank_info`` added if the function
    takes it. All of these have to be picklable. torch is imported there only if one of them, or a writer of another
    kind than :class:`~lastgood.checkpoint_writer.CheckpointWriter`, needs it.

    Saves land in the order in which they were asked for. When the process dies, the saves in flight fail, and the next
    one starts a new process. What is wholly staged when the trainer dies is still written.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        config: CheckpointProcessConfig,
        subprocess_init_fn: Callable[..., Any],
        subprocess_init_args: tuple[Any, ...],
        checkpoint_writer_init_fn: Callable[..., Any],
        checkpoint_writer_init_args: dict[str, Any],
    ) -> None:
        refuse_while_main_is_imported()
        if not hasattr(os, "eventfd"):
            raise ConfigError(
                "asynchronous checkpoints need Linux: this platform has no memory and events that processes share by "
                "descriptor. Use make_sync_checkpointer."
            )
        config.check()
        self._rank_info = rank_info
        self._config = config
        functions = (subprocess_init_fn, subprocess_init_args, checkpoint_writer_init_fn, checkpoint_writer_init_args)
        self._functions, self._descriptors = pack(
            functions, "subprocess_init_fn, checkpoint_writer_init_fn or one of their arguments", sharing=True
        )
        self.process: ProcessHandle | None = None
        """The process, once it has been started: ``processes[0]`` has ``pid`` and ``is_alive()``."""
        self._parent_end: Connection | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._stager: Any = None
        self._turns: deque[PendingSave] = deque()
        self._saves: set[PendingSave] = set()
        self._saves_asked_for = 0
        self._is_closed = False
        self._leave_when_done = False
        self._links: list[ProcessLink] = []
        with self._lock:
            link = self._new_link()
        self.process_creation_future: Future[None] = link.created
        """Resolves when the process is ready; raises a ``TimeoutError``, or a ``RuntimeError`` that says why not."""

    def write(
        self, state_dict: STATE_DICT | Future[STATE_DICT] | Snapshot, path: str, **kwargs: Any
    ) -> ObservedFuture[None]:
        """Write to ``path`` what was staged; the future resolves when the checkpoint is durable.

        A snapshot, or the future that asynchronous staging returned, is written from the memory that it stands in, and
        begins to be written while it is still being staged. The result of another future is waited for. A plain dict
        is copied before this returns; a writer of the user's own gets those of its tensors that are in shared memory
        already as they are. ``kwargs`` reach the writer, and its hooks.
        """
        save = self._new_save(path)
        snapshot = _snapshot_in(state_dict)
        try:
            save.call, _ = pack((path, kwargs), f"the path or an argument of the save to {path}", sharing=False)
        except Exception as error:
            save.end(error)
        if snapshot is not None:
            # Also if the save has failed: it releases the snapshot then.
            self._observe(save, snapshot)
        elif save.is_ended:
            pass
        elif isinstance(state_dict, Future):
            try:
                start_or_do(partial(self._stage_later, save, state_dict), name="lastgood-await-state")
            except BaseException as error:
                save.end(error)  # or all later ones would wait for their turn
                raise
        else:
            assert not isinstance(state_dict, Snapshot)  # as above
            self._stage(save, state_dict)
        return save.future

    def ping(self, timeout_secs: float = 30.0) -> dict[str, Any]:
        """What the process says of itself: its ``pid``, and whether it has imported torch (``torch_is_imported``)."""
        with self._lock:
            link = self._links[-1]
        try:
            return link.ping().result(timeout_secs)
        except TimeoutError:
            raise SaveTimeoutError(
                f"the checkpoint process {link.pid} did not answer within {timeout_secs:g} s"
            ) from None

    def forget_arenas(self, *arenas: int) -> None:
        """For stagers: nothing will be read from arenas with these numbers any more."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.forget_arenas(arenas)

    def close(self) -> None:
        """Wait for all saves, then end the process. May be called again; in a forked copy it does nothing.

        Raises :class:`~lastgood.errors.SaveTimeoutError` when saves are still under way after ``close_timeout_secs``;
        they go on, and the process ends after them. A process that has nothing to do and does not end is killed.
        """
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._is_closed = True
            saves = list(self._saves)
        unfinished = wait([save.future for save in saves], self._config.close_timeout_secs).not_done
        with self._lock:
            # What is sent from now on, after all, ends the process that it is sent to.
            self._leave_when_done = True
            links = list(self._links)
        for link in links:
            link.leave()
        if unfinished:
            paths = ", ".join(save.path for save in saves if save.future in unfinished)
            raise SaveTimeoutError(
                f"the saves to {paths} were not finished within {self._config.close_timeout_secs:g} s of closing "
                "(close_timeout_secs). The checkpoint process goes on with them, and ends after them; earlier "
                "checkpoints are untouched.",
                phase="close",
            )
        for link in links:
            self._see_out(link)
        with self._lock:
            self._links.clear()
            descriptors, self._descriptors = self._descriptors, []
            stager, self._stager = self._stager, None
        close_all(descriptors)
        if stager is not None:
            stager.close()

    def _see_out(self, link: ProcessLink) -> None:
        """Wait until a process that has nothing to do is gone; kill it if it stays."""
        handle = link.wait_until_started(self._config.subprocess_init_timeout_secs)
        if handle is not None:
            child, timeout = handle.processes[0], self._config.subprocess_shutdown_timeout_secs
            # Users replace join().
            if not handle.join(timeout=timeout) or not child.wait(timeout):
                if child.is_alive():
                    _events.logger.warning(
                        "the idle checkpoint process %s did not leave within %g s, and is killed", child.pid, timeout
                    )
                child.kill()
                child.wait(_KILL_SECS)
        link.join(_KILL_SECS)

    # A save on its way to the process

    def _new_save(self, path: object) -> PendingSave:
        if os.getpid() != self._owner:
            raise ConfigError(
                f"this checkpoint process belongs to process {self._owner}; a copy made by fork cannot save by it"
            )
        working_directory = None
        with contextlib.suppress(OSError):  # it has been removed: an absolute path does without
            working_directory = os.getcwd()
        with self._lock:
            if self._is_closed:
                raise ConfigError(f"the save to {path} came after close(): this checkpoint process takes no more")
            self._saves_asked_for += 1
            number = self._saves_asked_for
            save = PendingSave(number, path, working_directory, self._config.no_progress_timeout_secs, self._ended)
            self._turns.append(save)
            self._saves.add(save)
        return save

    def _ended(self, save: PendingSave) -> None:
        with self._lock:
            self._saves.discard(save)
        self._take_turns()

    def _observe(self, save: PendingSave, snapshot: Snapshot) -> None:
        save.attach(snapshot)
        try:
            snapshot.placed.add_done_callback(lambda placed: self._placed(save, placed))
        finally:
            snapshot.observe(save)  # interrupted or not: the save gives the snapshot back when it has been staged

    def _placed(self, save: PendingSave, placed: Future[Placement]) -> None:
        error = placed.exception()
        if error is not None:
            save.staging_never_began(error)
            return
        try:
            save.place(placed.result())
        except OSError as failure:  # no free descriptor
            save.end(self._cannot_send(save, failure))
        self._take_turns()

    def _take_turns(self) -> None:
        """Send those saves that are ready, unless an earlier one is not."""
        failures: list[tuple[PendingSave, BaseException]] = []
        try:
            with self._lock:
                while self._turns and self._turns[0].is_ready:
                    save = self._turns.popleft()
                    if save.is_ended:
                        continue
                    try:
                        self._send(save)
                    except BaseException as error:
                        failures.append((save, error))
                        if not isinstance(error, Exception):
                            raise
        finally:
            for save, failure in failures:
                save.end(failure)

    def _send(self, save: PendingSave) -> None:
        link = self._links[-1]
        if link.is_usable and link.was_cut_off:
            link.leave()
            raise CheckpointProcessError(
                f"Child process terminated unexpectedly: its pipe (process {link.pid}) was closed here. The save to "
                f"{save.path} failed, earlier checkpoints are untouched. The next save starts a new process.",
                pid=link.pid,
                path=save.path,
            )
        try:
            # It may end between being asked and being told.
            if not (link.is_usable and link.submit(save)):
                link = self._new_link()
                if not link.submit(save):
                    raise CheckpointProcessError(
                        f"Child process terminated unexpectedly: a new one for the save to {save.path} could not be "
                        "started. Earlier checkpoints are untouched; the log says why.",
                        path=save.path,
                    )
        except OSError as error:
            raise self._cannot_send(save, error) from error
        if self._leave_when_done:
            link.leave()

    def _cannot_send(self, save: PendingSave, error: OSError) -> CheckpointProcessError:
        return CheckpointProcessError(
            f"the save to {save.path} could not be passed to a checkpoint process ({error}); earlier checkpoints are "
            "untouched.",
            path=save.path,
        )

    def _new_link(self) -> ProcessLink:
        """Start a process; called with the lock held."""
        launch = new_launch(self._config, self._rank_info, self._functions)
        descriptors = [os.dup(descriptor) for descriptor in self._descriptors]
        started = weakref.WeakMethod(self._started)

        def tell(link: ProcessLink) -> None:
            known = started()
            if known is not None:
                known(link)

        # The link's thread must not keep this object alive: when nobody has it any more, the process may leave.
        link = ProcessLink(launch, descriptors, self._config, tell)
        weakref.finalize(self, _let_leave, link, self._owner).atexit = False
        self._links = [old for old in self._links if not old.is_over]
        self._links.append(link)
        self.process_creation_future = link.created
        return link

    def _started(self, link: ProcessLink) -> None:
        with self._lock:
            if self._links and self._links[-1] is link:
                self.process, self._parent_end = link.handle, link.parent_end

    # State dicts that nobody has staged yet

    def _stage_later(self, save: PendingSave, pending: "Future[Any]") -> None:
        timeout = self._config.no_progress_timeout_secs
        try:
            state_dict = pending.result(timeout)
        except BaseException as error:
            if isinstance(error, TimeoutError) and not pending.done():
                error = SaveTimeoutError(
                    f"the state dict to be saved to {save.path} did not come within {timeout:g} s; the save was given "
                    "up, earlier checkpoints are untouched.",
                    path=save.path,
                    phase="stage",
                )
            save.end(error)
            return
        snapshot = _snapshot_in(state_dict)
        if snapshot is not None:
            self._observe(save, snapshot)
        else:
            self._stage(save, state_dict)

    def _stage(self, save: PendingSave, state_dict: STATE_DICT) -> None:
        try:
            snapshot = self._own_stager().snapshot(state_dict)
            try:
                save.shared = self._pack_shared_tensors(save, state_dict)
            except BaseException:
                snapshot.release()
                raise
        except Exception as error:
            save.end(error)
            return
        except BaseException as error:
            save.end(error)
            raise
        self._observe(save, snapshot)

    def _own_stager(self) -> Any:
        # Imported here: it brings torch, which a trainer that gives a dict of tensors has anyway.
        from lastgood.staging import CheckpointStagerConfig, DefaultStager

        with self._lock:
            if self._stager is None:
                self._stager = DefaultStager(CheckpointStagerConfig(use_async_staging=False))
            return self._stager

    def _pack_shared_tensors(self, save: PendingSave, state_dict: STATE_DICT) -> tuple[Parcel, list[int]] | None:
        with self._lock:
            if not self._links[-1].needs_state_dicts:
                return None
        tensors = find_shared_tensors(state_dict)
        if not tensors:
            return None
        return pack(tensors, f"the tensors in shared memory of the save to {save.path}", sharing=True)


def _let_leave(link: ProcessLink, owner: int) -> None:
    if os.getpid() == owner:
        # Not in this thread: the garbage collector may have stopped it while it holds the link's lock.
        start_or_do(link.leave, name="lastgood-leave")


def _snapshot_in(state: object) -> Snapshot | None:
    if isinstance(state, SnapshotFuture):
        return state.snapshot
    return state if isinstance(state, Snapshot) else None
