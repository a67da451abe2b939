"""Where the ranks of one checkpoint wait for each other before it is committed.

Two kinds are built in: ``"dist_barrier"`` uses the process group of the training itself, ``"tcp_store"`` a store of
its own, beside the training's collectives. Others are added with :func:`register_barrier`.
"""

import abc
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lastgood._coordination.connection import first_line
from lastgood._coordination.meeting import ALL_CAME, Meeting, Outcome, rank_list, wait_for
from lastgood._threads import call_with_timeout
from lastgood.errors import BarrierTimeoutError, ConfigError

logger = logging.getLogger(__name__)

# What the store gets on top of a time-out: to look up who is missing, and to tell the others.
_ANSWER_SECS = 5.0

# A year: beyond any sense, but not beyond what clocks and stores can count.
_LONGEST_SECS = 365 * 86400.0

_SAFE = "The checkpoint being saved is not committed; earlier ones are untouched."


class NoProcessGroupError(ConfigError, AssertionError):
    """A ``dist_barrier`` was asked for where no process group is initialised."""


class Barrier(abc.ABC):
    """A place where all ranks wait until each of them has come.

    The n-th meeting of one rank is the n-th meeting of every other: each rank calls :meth:`execute_barrier`, or
    :meth:`abandon` in its place, exactly once a checkpoint. A meeting that failed counts as one.
    """

    @abc.abstractmethod
    def execute_barrier(self) -> None:
        """Return once every rank has called this; raise if that can no longer happen, or takes too long."""

    def abandon(self, reason: str) -> None:
        """Tell the other ranks, instead of meeting them, that this rank will not come this time.

        For a rank whose part of the checkpoint failed: the others then fail at once, saying ``reason``, where they
        would wait for their time-out. Does its best and never raises. A barrier that has no way to tell the others
        leaves them to their time-out.
        """
        logger.warning("%s cannot tell the other ranks that this one gave up: %s", type(self).__name__, reason)


@dataclass
class BarrierConfig:
    """Which barrier to make: its registered name (``None``: no barrier), and the arguments of its constructor."""

    barrier_type: str | None = None
    barrier_args: dict[str, Any] = field(default_factory=dict)


Answer = TypeVar("Answer")
BarrierClass = TypeVar("BarrierClass", bound=type)

BARRIER_REGISTRY: dict[str, type] = {}
"""The barriers that :func:`create_barrier_from_config` knows, by the name that a configuration gives them."""


def register_barrier(barrier_class: BarrierClass) -> BarrierClass:
    """Class decorator: make a barrier known under the name in its class attribute ``barrier_type``.

    A later class of the same name takes the place of the earlier one.
    """
    name = getattr(barrier_class, "barrier_type", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{barrier_class.__qualname__} cannot be registered as a barrier: give it a class attribute barrier_type, "
            "the name by which configurations will ask for it."
        )
    BARRIER_REGISTRY[name] = barrier_class
    return barrier_class


def create_barrier_from_config(barrier_config: BarrierConfig) -> Barrier | None:
    """The barrier that a configuration describes, or ``None`` if it asks for none.

    Raises :class:`~lastgood.errors.ConfigError` for a name that is not registered, and for arguments that are
    missing or that the barrier does not take. Making a barrier may wait for the other ranks.
    """
    barrier_class = find_barrier_class(barrier_config)
    return None if barrier_class is None else barrier_class(**barrier_config.barrier_args)


def find_barrier_class(barrier_config: BarrierConfig) -> Callable[..., Barrier] | None:
    """The class of the barrier that a configuration describes, which is checked; ``None`` if it asks for none."""
    name = barrier_config.barrier_type
    if name is None:
        return None
    if name not in BARRIER_REGISTRY:
        raise ConfigError(f"Unknown barrier type: {name}. Known types: {', '.join(sorted(BARRIER_REGISTRY))}.")
    barrier_class = BARRIER_REGISTRY[name]
    signature = inspect.signature(barrier_class)
    try:
        # A misspelt argument is missing as well: the name that was written says more.
        signature.bind_partial(**barrier_config.barrier_args)
        signature.bind(**barrier_config.barrier_args)
    except TypeError as error:
        accepted = ", ".join(signature.parameters) or "none"
        raise ConfigError(f"barrier_args of the barrier {name!r}: {error}. It takes: {accepted}.") from error
    return barrier_class


@register_barrier
class DistBarrier(Barrier):
    """The barrier of the training's own process group, under the time-out that the group was made with.

    Needs an initialised process group, in this process: it cannot work in a checkpoint process. It takes part in
    the training's order of collectives; where a checkpoint runs beside the training, use ``"tcp_store"``.
    """

    barrier_type = "dist_barrier"

    def __init__(self) -> None:
        _require_process_group()

    def execute_barrier(self) -> None:
        """Meet all ranks of the process group.

        Raises :class:`~lastgood.errors.BarrierTimeoutError` when the group reports a rank that is gone or late;
        the group does not say which, and is seldom of use afterwards.
        """
        _require_process_group()
        try:
            dist.barrier()
        except RuntimeError as error:
            raise BarrierTimeoutError(
                f"Rank {dist.get_rank()} could not meet the other ranks of the process group: {first_line(error)}. "
                f"{_SAFE} A rank has died or was slower than the group's time-out: look at the other ranks' logs, "
                "and restart the job.",
                rank=dist.get_rank(),
                phase="barrier",
            ) from error


def _require_process_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise NoProcessGroupError(
            "dist_barrier needs an initialised process group: call torch.distributed.init_process_group first, "
            "or use the barrier type tcp_store, which needs none."
        )


@register_barrier
class TCPStoreBarrier(Barrier):
    """A barrier over a TCP store of its own, which rank 0 keeps at ``master_address:tcpstore_port``.

    Making it waits until every rank has connected, at most ``timeout_barrier_init_secs``. Each meeting lasts at most
    ``timeout_secs``, and five seconds more if the store itself does not answer. The first rank to give up ends the
    meeting for all: those that wait fail at once, and so do those that come later.

    ``use_checkpoint_barrier_tcpstore_libuv=False`` asks for the store's older backend. Barriers at the same
    time need a port each. A rank that is started again needs the others to start again with it.
    """

    barrier_type = "tcp_store"

    def __init__(
        self,
        global_rank: int,
        global_world_size: int,
        barrier_prefix: str,
        timeout_barrier_init_secs: int,
        use_checkpoint_barrier_tcpstore_libuv: bool,
        tcpstore_port: int,
        master_address: str,
        timeout_secs: int,
    ) -> None:
        self._world_size = _number(int, "global_world_size", global_world_size, 1, 2**31 - 1)
        self._rank = _number(int, "global_rank", global_rank, 0, self._world_size - 1)
        self._timeout_secs = _number(float, "timeout_secs", timeout_secs, 0.001, _LONGEST_SECS)
        self._prefix = barrier_prefix
        self._sequence = 0
        port = _number(int, "tcpstore_port", tcpstore_port, 0, 65535)
        set_up_secs = _number(float, "timeout_barrier_init_secs", timeout_barrier_init_secs, 0.001, _LONGEST_SECS)
        self._address = f"{master_address}:{port}"
        self._store = self._connect(master_address, port, set_up_secs, use_checkpoint_barrier_tcpstore_libuv)

    def execute_barrier(self) -> None:
        """Meet all ranks.

        Raises :class:`~lastgood.errors.BarrierTimeoutError` when a rank did not come within ``timeout_secs``, said
        that it will not (:meth:`Barrier.abandon`), or the store is gone; ``missing_ranks`` names those that did not
        come. Raises :class:`~lastgood.errors.ConfigError` when another process has been here as this rank.
        """
        sequence = self._next_sequence()
        deadline = time.monotonic() + self._timeout_secs + _ANSWER_SECS

        def no_answer() -> BarrierTimeoutError:
            return self._error(
                sequence,
                f"the store at {self._address}, which rank 0 keeps, did not let it through within "
                f"{self._timeout_secs:g} s. Rank 0 is stopped or cut off, or a rank died in the very moment of meeting",
            )

        def in_time(ask: Callable[[], Answer]) -> Answer:
            left_secs = max(0.0, deadline - time.monotonic())
            return call_with_timeout(ask, left_secs, no_answer, name="barrier")

        try:
            in_time(lambda: self._arrive(sequence))
            meeting = self._meeting(sequence)
            if not wait_for(lambda _: in_time(lambda: meeting.is_decided), self._timeout_secs, self._world_size):
                in_time(lambda: self._time_out(sequence))
            in_time(lambda: self._leave(sequence))
        except dist.DistStoreError as error:
            raise no_answer() from error
        except dist.DistError as error:
            reason = f"the connection to the store at {self._address}, which rank 0 keeps, broke: {first_line(error)}"
            raise self._error(sequence, reason, (0,) if self._rank else ()) from error

    def abandon(self, reason: str) -> None:
        """Tell the other ranks that this one will not come; see :meth:`Barrier.abandon`. Takes five seconds at most."""
        sequence = self._next_sequence()
        reason = f"rank {self._rank} gave up before it came: {reason}"
        try:
            call_with_timeout(
                lambda: self._decide(sequence, Outcome(reason, (self._rank,))),
                _ANSWER_SECS,
                lambda: TimeoutError("the store does not answer"),
                name="barrier",
            )
        except Exception as error:
            logger.warning("could not tell the other ranks, at %s, that %s (%r)", self._address, reason, error)

    def _connect(self, host: str, port: int, timeout_secs: float, use_libuv: bool) -> Any:
        # The store's default is to use libuv: only another wish needs to be passed on.
        options = {} if use_libuv else {"use_libuv": False}

        def connect() -> Any:
            return dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                world_size=self._world_size,
                timeout=timedelta(seconds=timeout_secs),
                is_master=self._rank == 0,
                **options,
            )

        def failed(why: str) -> BarrierTimeoutError:
            role, hint = ("reach", "Did rank 0 start there") if self._rank else ("keep", "Did all ranks start")
            return BarrierTimeoutError(
                f"Rank {self._rank} of {self._world_size} could not {role} the barrier's store at {self._address} "
                f"within {timeout_secs:g} s: {why}. {hint}, and do all agree on master_address, tcpstore_port and "
                "global_world_size? No checkpoint was touched.",
                missing_ranks=(0,) if self._rank else (),
                rank=self._rank,
                phase="barrier set-up",
            )

        try:
            # The store does not count all of its waiting towards its own time-out: a server that accepts and then
            # says nothing would hold it for ever.
            return call_with_timeout(
                connect, timeout_secs + _ANSWER_SECS, lambda: failed("no answer"), name="barrier-set-up"
            )
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise ConfigError(
                    f"Rank 0 cannot keep the barrier's store at {self._address}: tcpstore_port {port} is in use, "
                    "maybe by another barrier or an earlier run. Choose another, the same on all ranks.",
                    rank=self._rank,
                    phase="barrier set-up",
                ) from error
            raise failed(first_line(error)) from error

    def _next_sequence(self) -> int:
        # Counted whether or not the meeting succeeds: only so do ranks that failed and ranks that did not
        # know of the failure meet again in the same place.
        sequence = self._sequence
        self._sequence += 1
        return sequence

    def _leave(self, sequence: int) -> None:
        """Once the meeting is decided; with all others, if it took place."""
        outcome = self._meeting(sequence).outcome()
        if outcome.reason is not None:
            raise self._error(sequence, outcome.reason, outcome.missing)
        if sequence > 0:
            # Everybody has left the meeting before this one: nobody will ask again who came to it.
            self._meeting(sequence - 1).forget()
        self._pass_together(sequence)

    def _arrive(self, sequence: int) -> None:
        """Count this rank in; the last one to come decides that the meeting took place.

        The keys ``rank<r>`` cannot show who came: all prefixes on a store share them.
        """
        self._store.set(f"rank{self._rank}", str(sequence))
        came = self._meeting(sequence).arrive()
        if not 0 < came <= self._world_size:
            raise ConfigError(
                f"Rank {self._rank} has been at barrier {sequence} of {self._prefix!r} before, at {self._address}: "
                "another process runs as the same rank, or this one was started again while the others were not. "
                f"{_SAFE} Restart all ranks together.",
                rank=self._rank,
                phase="barrier",
            )
        if came == self._world_size:
            self._decide(sequence, ALL_CAME)

    def _time_out(self, sequence: int) -> None:
        missing = self._meeting(sequence).missing()
        waited = f"rank {self._rank} waited {self._timeout_secs:g} s for {rank_list(missing)}"
        # If none is missing: the last one came this very moment, or died before it could say so.
        self._decide(sequence, Outcome(waited, missing) if missing else ALL_CAME)

    def _decide(self, sequence: int, outcome: Outcome) -> None:
        self._meeting(sequence).decide(outcome)

    def _meeting(self, sequence: int) -> Meeting:
        return Meeting(self._store, f"lastgood/{self._prefix}/{sequence}", self._rank, self._world_size)

    def _pass_together(self, sequence: int) -> None:
        from torch.distributed.elastic.utils import store as store_util  # absent where torch has no distributed part

        meet: Callable[..., None] = store_util.barrier
        try:
            meet(store=self._store, world_size=self._world_size, key_prefix=f"{self._prefix}{sequence}")
        except dist.DistNetworkError as error:
            # All ranks have come, which is what a barrier has to find out. Rank 0 may be the first to leave, and if
            # it was its last checkpoint, the store has gone with it.
            logger.info("the store at %s was closed right after barrier %d: %s", self._address, sequence, error)

    def _error(self, sequence: int, reason: str, missing: tuple[int, ...] = ()) -> BarrierTimeoutError:
        return BarrierTimeoutError(
            f"Rank {self._rank} could not meet the other {self._world_size - 1} ranks at barrier {sequence} of "
            f"{self._prefix!r}: {reason}. {_SAFE} Look at the log of {rank_list(missing) or 'the other ranks'}.",
            missing_ranks=missing,
            rank=self._rank,
            phase="barrier",
        )


Number = TypeVar("Number", int, float)


def _number(convert: Callable[[Any], Number], argument: str, value: object, lowest: Number, highest: Number) -> Number:
    # Ranks, sizes and ports often come straight from the environment, as strings.
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not lowest <= number <= highest:
        raise ConfigError(
            f"{argument} of a TCPStoreBarrier is {value!r}; expected a number from {lowest} to {highest}."
        )
    return number
