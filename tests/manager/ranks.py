"""What the processes of several ranks do when told to: one manager each, for the ranks of their process group."""

import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
from tests.helpers.workers import PATIENCE_SECS
from tests.manager.runs import manager_of, restore, tiny

from lastgood.barriers import BarrierConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import LastgoodError
from lastgood.manager.checkpoint_manager import CheckpointManager
from lastgood.manager.preemption import PREEMPTION_SIGNALS
from lastgood.manager.retention import KeepLast

_this_process: list[CheckpointManager] = []


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Become a rank."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # as torchrun would; the name of this machine may not resolve
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)


def open_manager(root: str, keep: int | None = None, **options: Any) -> None:
    rules = () if keep is None else (KeepLast(keep),)
    _this_process[:] = [manager_of(root, keep=rules, **options)]


def close_manager() -> None:
    _this_process.pop().close()


def close_and_tell() -> str:
    try:
        close_manager()
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"
    return "closed"


def save(steps: list[int]) -> list[int]:
    """The state of rank r at step n is that of number n + r; the steps that are there then."""
    manager = _this_process[0]
    for step in steps:
        manager.save(step, tiny(step + _rank()), {"loss": float(step)}).result(PATIENCE_SECS)
    manager.wait()
    return manager.steps()


def resume(step: int | None = None) -> tuple[int | None, int, list[tuple[int, bool]]]:
    """Where this rank goes on from, the number of the state that it found, what was passed over."""
    manager = _this_process[0]
    found, state = restore(manager, step)
    number = int(state["step"])
    expected = tiny(number)
    assert all(torch.equal(state["model"][name], expected["model"][name]) for name in expected["model"])
    return found, number, [(passed.step, passed.is_damaged) for passed in manager.passed_over]


class Refuses:
    """Takes no state."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise ValueError("this rank does not like what it was given")


class Takes(Refuses):
    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def save_object(step: int) -> None:
    _this_process[0].save(step, {"object": Takes()}).result(PATIENCE_SECS)


def fail_to_resume(how: str, failing: int) -> str:
    """Resume with a state that the failing rank cannot fill; the error that came of it."""
    fails = _rank() == failing
    state = tiny(0)
    if how == "object":
        state = {"object": Refuses() if fails else Takes()}
    elif fails:
        state["model"]["weights" if how == "shape" else "missing"] = torch.zeros(3)
    try:
        _this_process[0].restore(state)
    except (LastgoodError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def resume_and_tell() -> str:
    try:
        return str(resume())
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"


def set_aside(step: int) -> list[int]:
    _this_process[0].set_aside(step)
    return _this_process[0].steps()


def train_until_preempted(pipe: Connection, root: str, asynchronous: bool) -> tuple[int, bool, bool, list[int]]:
    """A step whenever the test says so; at which step it was preempted, and whether its last save was durable."""
    # A measurement of coverage has a handler of its own, which would be called too, and ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = CheckpointerConfig()
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS  # it imports torch, on a busy machine
    open_manager(
        root,
        config=config,
        asynchronous=asynchronous,
        every_steps=1000,
        preemption_signals=PREEMPTION_SIGNALS,
        grace_secs=PATIENCE_SECS,
    )
    manager = _this_process[0]
    state = tiny(0)
    step = 0
    while True:
        pipe.send("ready")
        assert pipe.recv() == "step"
        step += 1
        state["model"]["weights"].add_(1)
        saved = manager.save_if_due(step, state)
        if manager.preempted:
            break
        assert not saved
    is_durable = manager.save_before_exit(step, state)
    steps = manager.steps()
    close_manager()
    return step, saved, is_durable, steps


def _rank() -> int:
    return torch.distributed.get_rank()


class Gives(Takes):
    """Refuses to give its state."""

    def state_dict(self) -> dict[str, int]:
        raise ValueError("this rank does not give its state")


def save_and_fail(step: int, how: str, failing: int) -> str:
    """A save that one rank cannot make; what came of it on this one."""
    manager = _this_process[0]
    fails = _rank() == failing
    state: dict[str, Any] = tiny(step + _rank())
    metrics: Any = {"loss": "not a number"} if fails and how == "metrics" else None
    if fails and how == "object":
        state["object"] = Gives()
    if fails and how == "unsupported":
        state["lock"] = threading.Lock()
    if fails and how == "killed":
        checkpointer = manager._checkpointer
        assert isinstance(checkpointer, AsyncCheckpointer)
        assert checkpointer._checkpoint_process.process is not None
        child = checkpointer._checkpoint_process.process.processes[0]
        child.kill()
        assert child.wait(PATIENCE_SECS)
    try:
        manager.save(step, state, metrics).result(PATIENCE_SECS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def open_asynchronous_manager(root: str) -> None:
    config = CheckpointerConfig()
    config.process_config.subprocess_init_timeout_secs = PATIENCE_SECS
    config.process_config.nice = 0
    _this_process[:] = [manager_of(root, asynchronous=True, config=config)]


def open_manager_with_a_barrier(root: str) -> str:
    config = CheckpointerConfig(barrier_config=BarrierConfig("dist_barrier"))
    try:
        manager_of(root, config=config)
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def save_after(step: int) -> str:
    """A save of this rank; what came of it."""
    try:
        _this_process[0].save(step, tiny(step + _rank())).result(PATIENCE_SECS)
    except LastgoodError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"
