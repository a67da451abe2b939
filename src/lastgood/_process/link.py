"""The trainer's end of one checkpoint process: it starts it, talks to it, and knows when it is gone.

One thread does all of that. What it learns goes to the saves through threads of their own, so that whoever reacts to
the end of a save may do what he likes.
"""

import contextlib
import os
import pickle
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lastgood import _events
from lastgood._process.child_process import ChildOutput, ChildProcess, ProcessHandle, open_pidfd
from lastgood._process.launch import SIGNALS_TO_THE_TRAINER, CheckpointProcessConfig, Launch, environment_of_child
from lastgood._process.pending_save import PendingSave
from lastgood._process.pipe import MessagePipe, Outbox, RequestType, WorkerRequest, WorkerResponse
from lastgood._snapshot import Placement
from lastgood._threads import start, start_or_do
from lastgood.errors import CheckpointProcessError, SaveTimeoutError

_SPARE_ARENAS = 1
"""Mappings that the process keeps although no save needs them now. One more costs memory if its arena was given up
meanwhile, one fewer the time to map it again."""

_CONFIRM_SECS = 5.0
_IDLE_SECS = 60.0
_DIED = "Child process terminated unexpectedly"


@dataclass
class _Ending:
    """Why the process serves no longer. ``error`` makes the failure of the save to a path, or of the start."""

    error: Callable[[str | None], Exception]
    reusable: bool = True


class ProcessLink:
    """One checkpoint process, from its start to its end.

    ``created`` resolves when it is ready, or says why it will not be. ``handle`` and ``parent_end`` are there once
    it has been started, which is when ``spawned`` is called.
    """

    def __init__(
        self,
        launch: Launch,
        descriptors: Sequence[int],
        config: CheckpointProcessConfig,
        spawned: Callable[["ProcessLink"], None],
    ) -> None:
        self.created: Future[None] = Future()
        self.created.set_running_or_notify_cancel()
        self.handle: ProcessHandle | None = None
        self.parent_end: Connection | None = None
        self.needs_state_dicts = True
        """Whether its writer takes state dicts, not images: so it is until the process has said otherwise."""
        self._config = config
        self._spawned = spawned
        self._lock = threading.Lock()
        self._outbox = Outbox()
        self._saves: dict[int, PendingSave] = {}
        self._arenas: OrderedDict[int, int] = OrderedDict()
        self._pings: dict[int, Future[dict[str, Any]]] = {}
        self._is_over = False
        self._is_leaving = False
        self._has_started = threading.Event()
        self._is_ready = False
        self._start_failure: str | None = None
        self._output = ChildOutput()
        self._outbox.post(WorkerRequest(RequestType.PING, {"ping": 0, "launch": launch}), descriptors)
        self._thread = threading.Thread(target=self._run, name="lastgood-checkpoint-process", daemon=True)
        try:
            start(self._thread)
        except BaseException:
            self.leave()  # nobody will have this link, and its thread may be running
            raise

    # What other threads call. None of it waits, but join().

    @property
    def is_usable(self) -> bool:
        """It takes saves, as far as is known."""
        with self._lock:
            if self._is_over or self._is_leaving:
                return False
            handle = self.handle
        return handle is None or handle.processes[0].is_alive()

    @property
    def is_over(self) -> bool:
        """The process is gone, or given up, and its saves have been told."""
        with self._lock:
            return self._is_over

    @property
    def was_cut_off(self) -> bool:
        """Somebody has closed ``parent_end``."""
        with self._lock:
            return not self._is_over and self.parent_end is not None and self.parent_end.closed

    @property
    def pid(self) -> int | None:
        return None if self.handle is None else self.handle.processes[0].pid

    def submit(self, save: PendingSave) -> bool:
        """Send a save whose turn has come; ``False`` if the process serves no longer."""
        with self._lock:
            if self._is_over or self._is_leaving:
                return False
            self._saves[save.number] = save
        if not save.begin(self._outbox.post, self._claim_arena):
            with self._lock:
                self._saves.pop(save.number, None)
        return True

    def _claim_arena(self, placement: Placement) -> tuple[bool, list[int]]:
        with self._lock:
            is_new = self._arenas.get(placement.arena, -1) < placement.arena_size
            if is_new:
                self._arenas[placement.arena] = placement.arena_size
            self._arenas.move_to_end(placement.arena)
            in_use = {save.placement.arena for save in self._saves.values()}
            spare = [arena for arena in self._arenas if arena not in in_use]  # the one used last comes last
            forgotten = spare[: max(0, len(spare) - _SPARE_ARENAS)]
            for arena in forgotten:
                del self._arenas[arena]
        return is_new, forgotten

    def forget_arenas(self, arenas: Sequence[int]) -> None:
        """Nothing will be read from these any more: the process lets go of their memory."""
        with self._lock:
            known = [arena for arena in arenas if self._arenas.pop(arena, None) is not None]
        if known:
            self._outbox.post(WorkerRequest(RequestType.WRITE_CHECKPOINT, {"event": "forget", "arenas": known}))

    def ping(self) -> Future[dict[str, Any]]:
        """What the process says of itself."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._is_over:
                answer.set_exception(CheckpointProcessError(f"{_DIED}: there is none to ask.", pid=self.pid))
                return answer
            number = max(self._pings, default=0) + 1
            self._pings[number] = answer
        self._outbox.post(WorkerRequest(RequestType.PING, {"ping": number}))
        return answer

    def leave(self) -> None:
        """Take no more saves; the process ends once it has finished those that it has."""
        with self._lock:
            if self._is_leaving:
                return
            self._is_leaving = True
        self._outbox.post(WorkerRequest(RequestType.TERMINATE_PROCESS, {}))

    def wait_until_started(self, timeout_secs: float) -> ProcessHandle | None:
        """The process, once it has been started; ``None`` if it could not be."""
        self._has_started.wait(timeout_secs)
        return self.handle

    def join(self, timeout_secs: float) -> bool:
        """Wait until the process is gone and all that it held here is released; whether that is so."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_secs)
        return not self._thread.is_alive()

    # What the thread of the link does.

    def _run(self) -> None:
        pipe: MessagePipe | None = None
        try:
            pipe, child = self._start()
            ending = self._serve(pipe, child)
        except Exception as error:
            ending = self._failed(error)
        self._finish(ending, pipe)

    def _failed(self, error: Exception) -> _Ending:
        confirmed = self.handle is None or self.handle.processes[0].end(_CONFIRM_SECS)

        def as_error(path: str | None) -> Exception:
            failure = CheckpointProcessError(
                f"the checkpoint process could not be started or talked to: {error}. The next save starts a new one; "
                "earlier checkpoints are untouched.",
                pid=self.pid,
                path=path,
            )
            failure.__cause__ = error
            return failure

        return _Ending(as_error, reusable=confirmed)

    def _start(self) -> tuple[MessagePipe, ChildProcess]:
        ours, theirs = socket.socketpair()
        pipe = MessagePipe(ours)
        trainer = open_pidfd(os.getpid())
        try:
            passed = [theirs.fileno(), *([] if trainer is None else [trainer])]
            child = ChildProcess(
                "lastgood._worker",
                [str(descriptor) for descriptor in passed],
                pass_fds=passed,
                environment=environment_of_child(),
                output=self._output.descriptor,
                held_back=SIGNALS_TO_THE_TRAINER,
            )
        except BaseException:
            pipe.close()
            raise
        finally:
            theirs.close()
            if trainer is not None:
                os.close(trainer)
        # A descriptor of its own: whoever closes it takes none away that this thread is waiting on.
        parent_end: Connection = Connection(os.dup(ours.fileno()))
        with self._lock:
            self.parent_end, self.handle = parent_end, ProcessHandle(child)
        self._spawned(self)
        self._has_started.set()
        return pipe, child

    def _serve(self, pipe: MessagePipe, child: ChildProcess) -> _Ending:
        started = last = time.monotonic()
        silent = idle = 0.0
        poller = select.poll()
        poller.register(self._outbox, select.POLLIN)
        if child.end_descriptor is not None:
            poller.register(child.end_descriptor, select.POLLIN)
        while True:
            # That the other end is gone is found by receiving, together with what it said last.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._outbox.move_to(pipe)
            poller.register(pipe, select.POLLIN | (select.POLLOUT if pipe.has_unsent else 0))
            wait_secs = self._wait_secs(started)
            ready = {descriptor for descriptor, _ in poller.poll(wait_secs * 1000)}
            # Asked for before the last messages are read: a process that has ended sends no more after that.
            has_ended = child.end_descriptor in ready or not child.is_alive()
            heard = False
            for received in pipe.receive():
                self._handle(received.message)
                heard = True
            self._forward_output()
            if self._start_failure is not None:
                return self._failed_to_start(child, self._start_failure)
            if has_ended or pipe.is_ended:
                return self._died(child)
            # Time in which this process was itself stopped, or the whole machine, counts no longer than one wait.
            elapsed = min(time.monotonic() - last, wait_secs + 0.1)
            last = time.monotonic()
            if not self._is_ready and last - started > self._config.subprocess_init_timeout_secs:
                return self._too_slow_to_start(child)
            has_work, is_leaving = self._state()
            silent = silent + elapsed if has_work and self._is_ready and not heard else 0.0
            idle = idle + elapsed if is_leaving and not has_work else 0.0
            if silent > self._config.no_progress_timeout_secs:
                return self._gave_no_sign_of_life(child)
            if idle > self._config.subprocess_shutdown_timeout_secs + _CONFIRM_SECS:
                # Whoever told it to leave no longer waits for it.
                child.end(_CONFIRM_SECS)

    def _state(self) -> tuple[bool, bool]:
        with self._lock:
            return bool(self._saves or self._pings), self._is_leaving

    def _wait_secs(self, started: float) -> float:
        has_work, is_leaving = self._state()
        if not self._is_ready:
            return max(0.0, started + self._config.subprocess_init_timeout_secs - time.monotonic()) + 0.001
        return self._config.heartbeat_secs if has_work or is_leaving else _IDLE_SECS

    def _handle(self, response: WorkerResponse) -> None:
        payload = response.payload or {}
        if response.request_type is RequestType.WRITE_CHECKPOINT:
            with self._lock:
                save = self._saves.pop(payload["save"], None)
            for event in payload.get("events", ()):
                _events.publish(event)
            if save is not None:
                error = None if response.success else self._error_of(response, save.path)
                _in_background(lambda: save.end(error))
        elif response.request_type is RequestType.PING and payload.get("ping") == 0:
            if not response.success:
                self._start_failure = response.error_msg or "no reason was given"
                return
            self.needs_state_dicts = payload["needs_state_dicts"]
            self._is_ready = True
            _in_background(lambda: self.created.set_result(None))
        elif response.request_type is RequestType.PING and "heartbeat" in payload:
            if payload["heartbeat"] is not None:
                _events.publish_progress(payload["heartbeat"])
        elif response.request_type is RequestType.PING and "ping" in payload:
            with self._lock:
                answer = self._pings.pop(payload["ping"], None)
            if answer is not None:
                _in_background(lambda: answer.set_result(payload))

    def _error_of(self, response: WorkerResponse, path: str) -> BaseException:
        """The very error that the process met, its traceback there as a note; or its words, if it did not travel."""
        text = f"In the checkpoint process {self.pid}:\n{response.error_msg}"
        try:
            error = pickle.loads((response.payload or {})["error"])
            if isinstance(error, Exception):
                error.add_note(text)
                return error
        except Exception:
            pass
        return CheckpointProcessError(
            f"the save to {path} failed; earlier checkpoints are untouched. {text}", pid=self.pid, path=path
        )

    def _forward_output(self, *, all_of_it: bool = False) -> None:
        lines = self._output.read_lines(all_of_it=all_of_it)
        if lines:
            _events.logger.warning("checkpoint process %s says:\n%s", self.pid, lines)

    # How it can end.

    def _died(self, child: ChildProcess) -> _Ending:
        confirmed = child.wait(_CONFIRM_SECS) or child.end(_CONFIRM_SECS)
        self._forward_output(all_of_it=True)
        how = f"the checkpoint process {child.pid} {child.how_it_ended()}"
        starting = "" if self._is_ready else ", before it was ready"
        return self._ending(f"{_DIED}: {how}{starting}.", confirmed)

    def _failed_to_start(self, child: ChildProcess, reason: str) -> _Ending:
        confirmed = child.wait(_CONFIRM_SECS) or child.end(_CONFIRM_SECS)
        self._forward_output(all_of_it=True)
        return self._ending(f"the checkpoint process {child.pid} could not be started:\n{reason.rstrip()}\n", confirmed)

    def _too_slow_to_start(self, child: ChildProcess) -> _Ending:
        confirmed = child.end(_CONFIRM_SECS)
        self._forward_output(all_of_it=True)
        secs = self._config.subprocess_init_timeout_secs
        message = (
            f"Timed out after {secs:g} s waiting for the checkpoint process {child.pid} to be ready, and killed it. "
            "Does its initialization take longer, or is the machine overloaded? subprocess_init_timeout_secs sets the "
            "time."
        )
        return self._ending(message, confirmed, of_type=SaveTimeoutError)

    def _gave_no_sign_of_life(self, child: ChildProcess) -> _Ending:
        confirmed = child.end(_CONFIRM_SECS)
        self._forward_output(all_of_it=True)
        end = "and was killed" if confirmed else "and could not be killed: it is stuck in the operating system"
        message = (
            f"the checkpoint process {child.pid} gave no sign of progress for "
            f"{self._config.no_progress_timeout_secs:g} s {end}. Was it stopped, or does storage hang?"
        )
        return self._ending(message, confirmed)

    def _ending(
        self,
        message: str,
        confirmed: bool,
        of_type: type[CheckpointProcessError] | type[SaveTimeoutError] = CheckpointProcessError,
    ) -> _Ending:
        output, pid = self._output.last_lines(), self.pid
        said = f" The last it said:\n{output}" if output else ""

        def as_error(path: str | None) -> Exception:
            lost = "" if path is None else f" The save to {path} failed; earlier checkpoints are untouched, and the"
            text = f"{message}{lost or ' The'} next save starts a new process.{said}"
            if of_type is SaveTimeoutError:
                return SaveTimeoutError(text, path=path)
            return CheckpointProcessError(text, pid=pid, path=path)

        return _Ending(as_error, reusable=confirmed)

    def _finish(self, ending: _Ending, pipe: MessagePipe | None) -> None:
        with self._lock:
            self._is_over = True
            saves, self._saves = list(self._saves.values()), {}
            pings, self._pings = list(self._pings.values()), {}
            if self.parent_end is not None and not self.parent_end.closed:
                self.parent_end.close()
        self._has_started.set()
        self._outbox.close()
        if pipe is not None:
            pipe.close()
        if self.handle is not None:
            self.handle.processes[0].close()
        self._output.close()
        if not self._is_ready or saves:
            _events.logger.error("%s", ending.error(None))

        def tell() -> None:
            if not self._is_ready:
                self.created.set_exception(ending.error(None))
            for save in saves:
                save.end(ending.error(save.path), reusable=ending.reusable)
            for answer in pings:
                answer.set_exception(ending.error(None))

        _in_background(tell)


def _in_background(function: Callable[[], None]) -> None:
    """Resolve futures outside of the link's thread: their callbacks are the user's, and may ask for another save."""
    start_or_do(function, name="lastgood-save-ended")
