"""What the trainers of several ranks do when told to: one asynchronous checkpointer each, whose processes vote."""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.distributed.in_voting_child import do_at, make_writer
from tests.helpers.saves import state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.survival.trainers import process_of

from lastgood.builder import make_async_checkpointer
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import LastgoodError

_this_process: list[AsyncCheckpointer] = []
_gates: list[Connection] = []


def set_up(rank: int, world_size: int, rendezvous: str, orders: str, timeout_secs: int = 600) -> int:
    """The number of the checkpoint process. From then on there is no process group any more: saves do without."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # as torchrun would; the name of this machine may not resolve
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    config = CheckpointerConfig()
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS  # it imports torch, on a busy machine
    config.process_config.nice = 0  # nor does it wait for whatever else the machine does
    config.writer_config.write_barrier_timeout_secs = timeout_secs
    ours, theirs = multiprocessing.Pipe()
    _gates[:] = [ours, theirs]  # both: a process that is started anew has the other end, too
    checkpointer = make_async_checkpointer(
        config,
        subprocess_init_fn=do_at,
        subprocess_init_args=(f"{orders}-{rank}",),
        checkpoint_writer_init_fn=make_writer,
        checkpoint_writer_init_args={"pipe": theirs},
    )
    _this_process[:] = [checkpointer]
    process = process_of(checkpointer)
    dist.barrier()
    dist.destroy_process_group()
    return process


def process() -> int:
    return process_of(_this_process[0])


def save(path: str, number: int, **kwargs: Any) -> str:
    """How it ended."""
    try:
        _this_process[0].save(path, state_of(number), **kwargs)[1].result(PATIENCE_SECS)
    except (LastgoodError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def save_wishing(path: str, number: int, wish: str) -> str:
    return save(path, number, wish=wish)


def save_what_cannot_be(path: str, number: int) -> str:
    try:
        _this_process[0].save(path, {**state_of(number), "lock": threading.Lock()})
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def stage(path: str, number: int, wish: str | None = None) -> None:
    _this_process[0].save(path, state_of(number), wish=wish)[0].result(PATIENCE_SECS)


def outcome() -> str:
    """Of the last save."""
    error = _this_process[0]._saves[-1].written.exception(PATIENCE_SECS)
    return "saved" if error is None else f"{type(error).__name__}: {error}"


def at_gate() -> Any:
    """Where the save that wished to wait has come to."""
    assert _gates[0].poll(PATIENCE_SECS), "the save does not come to the gate"
    return _gates[0].recv()


def open_gate() -> None:
    _gates[0].send("go on")


def close() -> None:
    _this_process.pop().close()


def order(orders: Path, rank: int, verb: str, operation: str, part: str) -> None:
    """Have something done in the checkpoint process of a rank."""
    Path(f"{orders}-{rank}").write_text(f"{verb}|{operation}|{part}")
