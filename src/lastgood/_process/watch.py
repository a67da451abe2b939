"""The thread of a checkpoint process that reads its pipe, answers, says that it lives, and watches its trainer."""

import contextlib
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from lastgood import _events
from lastgood._process.jobs import JobQueue
from lastgood._process.launch import CheckpointProcessConfig
from lastgood._process.pipe import MessagePipe, Outbox, Received, RequestType, WorkerResponse, close_all
from lastgood.errors import CheckpointProcessError

_IDLE_SECS = 60.0
_LEAST_CPU_SECS = 0.001


class Progress:
    """Whether this process does anything: uses the processor, but for the thread that asks, or moves data of files."""

    def __init__(self) -> None:
        self._cpu = 0.0
        self._moved: tuple[int, ...] = ()

    def has_moved(self) -> bool:
        """Since the last time that the answer was yes."""
        cpu, moved = time.process_time() - time.thread_time(), _bytes_moved()
        if cpu - self._cpu < _LEAST_CPU_SECS and moved == self._moved:
            return False
        self._cpu, self._moved = cpu, moved
        return True


def _bytes_moved() -> tuple[int, ...]:
    # Not rchar: reading this file counts there.
    wanted = ("wchar:", "read_bytes:", "write_bytes:")
    try:
        with open("/proc/self/io") as file:
            fields = [line.split() for line in file]
    except OSError:
        return ()
    return tuple(int(value) for name, value in fields if name in wanted)


class TrainerWatch:
    """Owns the pipe. ``trainer`` is a pidfd of the trainer, where there are such; ``trainer_pid`` is its number.

    The end of the pipe alone would not tell: others that the trainer has forked hold copies of it.
    """

    def __init__(
        self,
        pipe: MessagePipe,
        trainer: int | None,
        trainer_pid: int,
        jobs: JobQueue,
        config: CheckpointProcessConfig,
    ) -> None:
        self._pipe = pipe
        self._trainer = trainer
        self._trainer_pid = trainer_pid
        self._jobs = jobs
        self._config = config
        self._outbox = Outbox()
        self._bounds_its_waits: Callable[[], bool] = lambda: False
        self._is_ready = False
        self.trainer_is_gone = False
        """From then on nothing more is asked for; it is said before the queue of jobs runs empty."""
        self._all_sent = threading.Event()
        self._silent = 0.0
        self._phase = ""
        self._progress = Progress()
        self._written: _events.Progress | None = None

    def start(self, received: list[Received]) -> None:
        """Begin, with messages that have come already."""
        _events.subscribe_to_progress(self._note_progress)
        for message in received:
            self._take(message)
        threading.Thread(target=self._run, name="lastgood-trainer-watch", daemon=True).start()

    def _note_progress(self, progress: _events.Progress) -> None:
        self._written = progress

    def answer(self, response: WorkerResponse) -> None:
        """Send it to the trainer, if there still is one."""
        self._outbox.post(response)

    def ready(self, *, bounds_its_waits: Callable[[], bool]) -> None:
        """There is a writer now; while it ``bounds_its_waits`` itself, it need not show that it gets on."""
        self._bounds_its_waits = bounds_its_waits
        self._is_ready = True

    def last_answer(self, response: WorkerResponse) -> None:
        """Send it and return when it is sent, or after a while."""
        if not self.trainer_is_gone:
            self._outbox.post(response, sent=self._all_sent.set)
            self._all_sent.wait(self._config.subprocess_shutdown_timeout_secs)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Without this thread nobody would notice anything any more; the trainer notices this.
            _leave_at_once(f"the thread that watches the trainer failed:\n{traceback.format_exc()}")

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._outbox, select.POLLIN)
        if self._trainer is not None:
            poller.register(self._trainer, select.POLLIN)
        last = last_beat = time.monotonic()
        while True:
            self._send()
            if not self.trainer_is_gone:
                poller.register(self._pipe, select.POLLIN | (select.POLLOUT if self._pipe.has_unsent else 0))
            is_waited_for = self._jobs.has_work or self.trainer_is_gone or self._trainer is None
            wait_secs = self._config.heartbeat_secs if is_waited_for else _IDLE_SECS
            ready = {descriptor for descriptor, _ in poller.poll(wait_secs * 1000)}
            if not self.trainer_is_gone:
                # Asked for before the last messages are read: a trainer that is gone sends no more after that.
                is_gone = self._trainer in ready if self._trainer is not None else os.getppid() != self._trainer_pid
                for received in self._pipe.receive():
                    self._take(received)
                if is_gone or self._pipe.is_ended:
                    for gone in (self._pipe, self._outbox, self._trainer):
                        if gone is not None:
                            poller.unregister(gone)
                    self._lose_trainer()
            now = time.monotonic()
            elapsed, last = min(now - last, wait_secs + 0.1), now
            if now - last_beat >= self._config.heartbeat_secs:
                last_beat = now
                self._beat()
            self._leave_if_stuck(elapsed)

    def _take(self, received: Received) -> None:
        request = received.message
        if request.request_type is RequestType.WRITE_CHECKPOINT:
            self._jobs.take(received)
            return
        close_all(received.descriptors)
        if request.request_type is RequestType.PING:
            about = {**request.payload, "pid": os.getpid(), "torch_is_imported": "torch" in sys.modules}
            self.answer(WorkerResponse(RequestType.PING, True, payload=about))
        elif request.request_type is RequestType.TERMINATE_PROCESS:
            self._jobs.leave()

    def _send(self) -> None:
        if self.trainer_is_gone:
            return
        # Receiving finds the end of the pipe, after the last messages.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._outbox.move_to(self._pipe)

    def _lose_trainer(self) -> None:
        """Finish what is wholly staged, and nothing else."""
        self.trainer_is_gone = True
        self._all_sent.set()
        self._jobs.abandon_incomplete(
            CheckpointProcessError("the trainer is gone, and had not staged the whole snapshot: it is dropped")
        )
        self._jobs.leave()
        self._outbox.close()

    def _beat(self) -> None:
        if not self._jobs.has_work or self.trainer_is_gone or self._pipe.has_unsent:
            return
        if self._gets_on():
            self._pipe.queue(WorkerResponse(RequestType.PING, True, payload={"heartbeat": self._written}))
            self._written = None

    def _gets_on(self) -> bool:
        job = self._jobs.current
        # Without a whole snapshot it is the trainer that is waited for.
        return self._bounds_its_waits() or job is None or not job.is_complete or self._progress.has_moved()

    def _leave_if_stuck(self, elapsed: float) -> None:
        """Nobody else ends a process whose trainer is gone."""
        if not self.trainer_is_gone:
            return
        config = self._config
        if not self._is_ready:
            phase, limit, gets_on = "getting ready", config.subprocess_init_timeout_secs, False
        elif self._jobs.has_work:
            phase, limit, gets_on = "writing", config.no_progress_timeout_secs, self._gets_on()
        else:
            phase, limit, gets_on = "leaving", config.subprocess_shutdown_timeout_secs, False
        if gets_on or phase != self._phase:
            self._silent, self._phase = 0.0, phase
            return
        self._silent += elapsed
        if self._silent > limit:
            _leave_at_once(f"its trainer is gone, and {phase} has stood still for {limit:g} s")


def _leave_at_once(why: str) -> NoReturn:
    print(f"the checkpoint process {os.getpid()} ends: {why}", file=sys.stderr, flush=True)
    os._exit(1)
