"""Where the ranks of a checkpointer meet: rank 0 finds a port, and all are told, once, in the foreground."""

import os
import secrets
import socket
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from lastgood._coordination.calls import Coordination
from lastgood.errors import BarrierTimeoutError, ConfigError, LastgoodError
from lastgood.types import RankInfo

Answer = TypeVar("Answer")

_SET_UP_SECS = 300.0
_BACKLOG = 4096


def is_of_process_group(rank_info: RankInfo) -> bool:
    """Whether this process has a default process group, and is this very rank of so many in it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return rank_info == RankInfo(distributed.get_rank(), distributed.get_world_size())


def meet_over_process_group(rank_info: RankInfo) -> Coordination:
    """For all ranks of the default process group, at the same time: the address that rank 0 offers.

    Over a group that is given up again at once; gloo, as not every backend can send objects. Raises
    :class:`~lastgood.errors.BarrierTimeoutError` where not all ranks make a checkpointer, and
    :class:`~lastgood.errors.ConfigError` where torch has no gloo.
    """
    distributed = torch.distributed
    if not distributed.is_gloo_available():
        raise ConfigError(
            "the ranks of a checkpointer find each other over gloo, and this torch was built without it; configure a "
            "barrier of the type tcp_store instead"
        )

    def failed(error: RuntimeError) -> BarrierTimeoutError:
        return BarrierTimeoutError(
            f"rank {rank_info.global_rank} could not meet the other {rank_info.global_world_size - 1} ranks to set up "
            f"their commits (within {_SET_UP_SECS:g} s, or one of them has ended): {error}. Does every rank of the "
            "default process group make its checkpointer, in the same order as the others? Where only some ranks save, "
            "pass their rank_info. No checkpoint was touched.",
            rank=rank_info.global_rank,
            phase="set-up",
        )

    try:
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=_SET_UP_SECS))
    except RuntimeError as error:
        raise failed(error) from error
    try:
        found = find_address(rank_info, lambda ask: from_first(ask, rank_info.global_rank, group))
        try:
            # A rank that gave the group up now could break it for one that is still connecting to others.
            distributed.barrier(group=group)
        except BaseException:
            found.close()
            raise
        return found
    except LastgoodError:
        raise
    except RuntimeError as error:
        raise failed(error) from error
    finally:
        distributed.destroy_process_group(group)


def from_first(ask: Callable[[], Answer], rank: int, group: Any) -> Answer:
    """What ``ask`` returns on rank 0; what it raises there, all ranks of the group raise."""
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = ask()
        except Exception as raised:
            error = raised
            outcome[1] = f"{type(raised).__name__}: {raised}"
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise LastgoodError(f"rank 0 failed: {outcome[1]}", rank=0)
    return outcome[0]  # type: ignore[no-any-return]


def find_address(
    rank_info: RankInfo, tell: Callable[[Callable[[], tuple[str, int, str, str]]], tuple[str, int, str, str]]
) -> Coordination:
    """The address of all ranks, which ``tell`` passes from rank 0 to them; on rank 0 with the socket."""
    listeners: list[socket.socket] = []

    def offer() -> tuple[str, int, str, str]:
        listeners.append(_listen())
        # The name that the ranks of torchrun meet under is one that all of them know.
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        return host, listeners[0].getsockname()[1], _job_of_process_group(), secrets.token_hex(16)

    try:
        host, port, job, series = tell(offer)
    except BaseException:
        for unused in listeners:
            unused.close()
        raise
    listener = listeners[0] if listeners else None
    return Coordination(rank_info.global_rank, rank_info.global_world_size, host, port, job, series, listener)


def _listen() -> socket.socket:
    """At a port of every network that this machine is on: which one the others come by is not known here."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", 0), backlog=_BACKLOG)


_job: tuple[Callable[[], Any], str] | None = None


def _job_of_process_group() -> str:
    """The id of the job: made by rank 0, the same for all that it makes in the default process group of this moment."""
    global _job
    group = torch.distributed.group.WORLD
    if _job is None or _job[0]() is not group:
        _job = (weakref.ref(group), secrets.token_hex(16))
    return _job[1]
