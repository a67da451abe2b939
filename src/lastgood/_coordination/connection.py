"""Connections to the store that rank 0 serves: opened when needed, given up in time, opened again when broken."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lastgood import _events
from lastgood._threads import call_with_timeout
from lastgood.storage._descriptors import allow_descriptors

Result = TypeVar("Result")

ANSWER_SECS = 5.0
"""What the store gets on top of a time-out, to answer."""

_ATTEMPT_SECS = 10.0
"""How long one attempt to connect gets, before it is looked whether rank 0 is still there."""

_HERE = "localhost"


class StoreUnreachableError(Exception):
    """The store does not answer, or its connection broke: who served it has ended, or is cut off."""


def serve(listener: socket.socket, world_size: int) -> Any:
    """Serve a store at the address that ``listener`` listens at, for as long as what is returned lives.

    The socket stays the caller's: another process that has it may serve there when this one has ended.
    """
    # Every rank's connection takes one here.
    if not allow_descriptors(world_size):
        _events.logger.warning(
            "rank 0 meets its %d ranks by a connection each, and may not have so many files open; raise the hard limit "
            "(ulimit -Hn)",
            world_size,
        )
    port = listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        _HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
    )


class Connection:
    """One client's. Not for several threads at once."""

    def __init__(self, host: str, port: int, *, served_here: bool) -> None:
        self.address = f"{host}:{port}"
        self._host = _HERE if served_here else host
        self._port = port
        self._store: Any = None

    @property
    def is_open(self) -> bool:
        """Whether there is one, as far as the last call could tell."""
        return self._store is not None

    def open(self, timeout_secs: float) -> None:
        """Make sure that there is a connection that works, opened anew if need be."""
        if self._store is not None:
            try:
                self.call(lambda store: store.check(["lastgood"]), ANSWER_SECS)
                return
            except StoreUnreachableError:
                pass  # that served by a process which has ended

        deadline = time.monotonic() + timeout_secs

        def connect() -> Any:
            while True:
                self._require_listener()
                left = max(0.0, deadline - time.monotonic())
                timeout = timedelta(seconds=min(left, _ATTEMPT_SECS))
                try:
                    return dist.TCPStore(  # type: ignore[attr-defined]
                        self._host, self._port, is_master=False, wait_for_workers=False, timeout=timeout
                    )
                except dist.DistError:
                    if left <= _ATTEMPT_SECS:
                        raise

        def no_answer() -> StoreUnreachableError:
            return StoreUnreachableError(f"the store at {self.address} did not answer within {timeout_secs:g} s")

        try:
            self._store = call_with_timeout(connect, timeout_secs + ANSWER_SECS, no_answer, name="connect")
        except dist.DistError as error:
            raise StoreUnreachableError(
                f"the store at {self.address} cannot be reached: {first_line(error)}"
            ) from error

    def _require_listener(self) -> None:
        """Rank 0's trainer keeps the address listened at as long as it lives, whatever becomes of its process."""
        try:
            socket.create_connection((self._host, self._port), ANSWER_SECS).close()
        except ConnectionRefusedError as error:
            raise StoreUnreachableError(f"nobody is at {self.address} any more") from error
        except OSError:
            return  # too slow, or not known by this name yet: the store's client says what is wrong

    def call(self, use: Callable[[Any], Result], timeout_secs: float) -> Result:
        """What ``use`` makes of the store; what takes longer is given up, and the connection with it."""
        store = self._store
        if store is None:
            raise StoreUnreachableError(f"there is no connection to the store at {self.address}")

        def no_answer() -> StoreUnreachableError:
            return StoreUnreachableError(f"the store at {self.address} did not answer within {timeout_secs:g} s")

        try:
            return call_with_timeout(lambda: use(store), timeout_secs + ANSWER_SECS, no_answer, name="store")
        except dist.DistError as error:
            self._store = None
            raise StoreUnreachableError(
                f"the connection to the store at {self.address} broke: {first_line(error)}"
            ) from error
        except BaseException:
            # Too late, or interrupted: the call goes on in a thread of its own, and has the connection until it ends.
            self._store = None
            raise

    def close(self) -> None:
        """Let go of it. What still waits in another thread keeps its own hold."""
        self._store = None


def first_line(error: BaseException) -> str:
    """What torch says, without the stack of its C++ code."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
