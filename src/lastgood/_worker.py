"""The checkpoint process: ``python -m lastgood._worker SOCKET [PIDFD_OF_THE_TRAINER]``.

It writes the checkpoints that its trainer stages in shared memory, and outlives it for as long as that takes. The main
thread runs what the user passed and the writes; another one reads the pipe and watches (``_process/watch``).
"""

import contextlib
import inspect
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from lastgood._process.jobs import JobQueue, Writing, failed
from lastgood._process.launch import Launch, apply, ignore_signals_to_the_trainer
from lastgood._process.parcels import unpack
from lastgood._process.pipe import MessagePipe, Received, RequestType, WorkerResponse
from lastgood._process.watch import TrainerWatch
from lastgood.checkpoint_writer import CheckpointWriter
from lastgood.types import RankInfo

_LAUNCH_SECS = 60.0


def main(descriptors: list[int]) -> int:
    """The exit status: 1 if the process could not be made ready, and 0 when it has done all its work."""
    ignore_signals_to_the_trainer()
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    pipe = MessagePipe(socket.socket(fileno=descriptors[0]))
    trainer = descriptors[1] if len(descriptors) > 1 else None
    first = _first_messages(pipe, trainer)
    if not first:
        return 0  # The trainer died before it had said what it wants.
    launch: Launch = first[0].message.payload["launch"]
    apply(launch)
    jobs = JobQueue()
    watch = TrainerWatch(pipe, trainer, launch.trainer_pid, jobs, launch.config)
    watch.start(first[1:])
    try:
        writer = _make_writer(launch, first[0].descriptors)
    except BaseException as error:
        watch.last_answer(failed(RequestType.PING, error, ping=0))
        return 1
    writing = Writing(writer, launch.config.no_progress_timeout_secs)
    # Of lastgood's own writer, all but the user's hooks.
    watch.ready(bounds_its_waits=lambda: writing.takes_images and not writer.is_in_hook)
    watch.answer(
        WorkerResponse(RequestType.PING, True, payload={"ping": 0, "needs_state_dicts": not writing.takes_images})
    )
    while (job := jobs.next()) is not None:
        watch.answer(writing.do(job))
        del job
    with contextlib.ExitStack() as last:
        last.callback(watch.last_answer, WorkerResponse(RequestType.TERMINATE_PROCESS, True))
        _close(writer, trainer_is_gone=watch.trainer_is_gone)
    return 0


def _first_messages(pipe: MessagePipe, trainer: int | None) -> list[Received]:
    """What the trainer has sent, once there is something; nothing if it is gone."""
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    if trainer is not None:
        poller.register(trainer, select.POLLIN)
    deadline = time.monotonic() + _LAUNCH_SECS
    while (left := deadline - time.monotonic()) > 0:
        ready = {descriptor for descriptor, _ in poller.poll(left * 1000)}
        received = pipe.receive()
        if received or pipe.is_ended or trainer in ready:
            return received
    return []


def _make_writer(launch: Launch, descriptors: list[int]) -> Any:
    init, init_arguments, make_writer, writer_arguments = unpack(launch.functions, descriptors)
    init(*init_arguments)
    return make_writer(**_with_rank_info(make_writer, writer_arguments, launch.rank_info))


def _with_rank_info(function: Callable[..., Any], arguments: dict[str, Any], rank_info: RankInfo) -> dict[str, Any]:
    if "rank_info" in arguments:
        return arguments
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        takes_it = True
    else:
        takes_it = any(each.name == "rank_info" or each.kind is each.VAR_KEYWORD for each in parameters)
    return {**arguments, "rank_info": rank_info} if takes_it else arguments


def _close(writer: Any, *, trainer_is_gone: bool) -> None:
    try:
        if trainer_is_gone and isinstance(writer, CheckpointWriter):
            writer.depart()
        close = getattr(writer, "close", None)
        if close is not None:
            close()
    except Exception:
        # All checkpoints are written: this is for the trainer's log.
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]]))
