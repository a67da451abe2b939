"""What the trainer and its checkpoint process say to each other, and how it travels.

The trainer sends :class:`WorkerRequest`, the process answers by :class:`WorkerResponse`, each pickled, in the framing
of :class:`multiprocessing.connection.Connection`. Descriptors go along with the first bytes of a message, which
says in its payload how many they are.

==================  ====================================================================================
PING                ``ping``: a number that the answer repeats. 0 is the request that brings the process to
                    life (see ``launch``); its answer says that it is ready, or why not. An answer that
                    nobody asked for (``heartbeat``) says that the process has work and gets on with it.
WRITE_CHECKPOINT    ``save``: the number of the save, and ``event``: "begin" (with all that a write needs, see
                    ``pending_save``), "advance" (``staged`` bytes are there), "complete", or "fail" (with a
                    ``reason``). One answer, at the end of the write. Without a save: "forget" (``arenas``).
TERMINATE_PROCESS   Leave once all that has begun is finished. Answered when that is the case.
==================  ====================================================================================
"""

import array
import contextlib
import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

_DESCRIPTORS_AT_ONCE = 200  # Linux allows 253
_READ_AT_ONCE = 256 << 10
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LONG_FRAME = 0x7FFFFFFF


class RequestType(Enum):
    """What a request is for."""

    PING = "ping"
    WRITE_CHECKPOINT = "write_checkpoint"
    TERMINATE_PROCESS = "exit"


@dataclass
class WorkerRequest:
    """From the trainer to its checkpoint process."""

    request_type: RequestType
    payload: dict[str, Any]


@dataclass
class WorkerResponse:
    """The answer. ``error_msg`` is the traceback of what went wrong there."""

    request_type: RequestType
    success: bool
    error_msg: str | None = None
    payload: dict[str, Any] | None = None


class Received(NamedTuple):
    """A message and its descriptors, which now belong to whoever received it."""

    message: Any
    descriptors: list[int]


@dataclass
class _Outgoing:
    data: memoryview
    descriptors: list[int]
    sent: Callable[[], None] | None


class MessagePipe:
    """One end of the socket. Nothing here waits; one thread at a time may use it."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._outgoing: deque[_Outgoing] = deque()
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self.is_ended = False
        """The other end is closed, and all that it sent has been received."""

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outgoing)

    def queue(
        self,
        message: WorkerRequest | WorkerResponse,
        descriptors: Sequence[int] = (),
        sent: Callable[[], None] | None = None,
    ) -> None:
        """Send it by the next :meth:`flush` that can. The descriptors are closed then, and ``sent`` is called."""
        if descriptors:
            message.payload = {**(message.payload or {}), "descriptors": len(descriptors)}
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        is_long = len(body) > _LONG_FRAME
        header = struct.pack("!iQ", -1, len(body)) if is_long else struct.pack("!i", len(body))
        self._outgoing.append(_Outgoing(memoryview(header + body), list(descriptors), sent))

    def flush(self) -> None:
        """Send as much as the other end has room for. Raises ``OSError`` when there is no other end any more."""
        while self._outgoing:
            first = self._outgoing[0]
            try:
                self._send_some(first)
            except BlockingIOError:
                return
            if not first.data:
                self._outgoing.popleft()
                if first.sent is not None:
                    first.sent()

    def _send_some(self, message: _Outgoing) -> None:
        if not message.descriptors:
            message.data = message.data[self._socket.send(message.data, socket.MSG_NOSIGNAL) :]
            return
        batch = message.descriptors[:_DESCRIPTORS_AT_ONCE]
        # Each batch needs a byte to travel with; the byte after the last batch brings the rest of the message.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", batch))]
        count = self._socket.sendmsg([message.data[:1]], rights, socket.MSG_NOSIGNAL)
        message.data = message.data[count:]
        del message.descriptors[: len(batch)]
        for descriptor in batch:
            os.close(descriptor)

    def receive(self) -> list[Received]:
        """All messages that are there. Raises ``OSError`` when descriptors got lost, for want of free ones."""
        found: list[Received] = []
        while not self.is_ended:
            try:
                data = self._receive_some()
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                self.is_ended = True
                break
            self._incoming += data
            self._take_messages(found)
        return found

    def _receive_some(self) -> bytes:
        # Not socket.recv_fds(): it passes no flags on, and children would inherit what comes.
        room = socket.CMSG_SPACE(_DESCRIPTORS_AT_ONCE * array.array("i").itemsize)
        data, attached, flags, _ = self._socket.recvmsg(_READ_AT_ONCE, room, _CLOSE_ON_EXEC)
        for level, kind, content in attached:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC:
            raise OSError("descriptors sent to this process got lost: it has as many open as it may (see `ulimit -n`)")
        return data

    def _take_messages(self, found: list[Received]) -> None:
        while (frame := self._take_frame()) is not None:
            message = pickle.loads(frame)
            count = (message.payload or {}).get("descriptors", 0)
            found.append(Received(message, [self._descriptors.popleft() for _ in range(count)]))

    def _take_frame(self) -> bytes | None:
        if len(self._incoming) < 4:
            return None
        start, (size,) = 4, struct.unpack_from("!i", self._incoming)
        if size == -1:
            if len(self._incoming) < 12:
                return None
            start, (size,) = 12, struct.unpack_from("!Q", self._incoming, 4)
        if len(self._incoming) < start + size:
            return None
        frame = bytes(self._incoming[start : start + size])
        del self._incoming[: start + size]
        return frame

    def close(self) -> None:
        """Close it, with the descriptors that were not sent or not taken."""
        self._socket.close()
        self.is_ended = True
        for message in self._outgoing:
            close_all(message.descriptors)
        self._outgoing.clear()
        close_all(self._descriptors)
        self._descriptors.clear()


class Outbox:
    """What any thread wants sent by the one that has the pipe, and what wakes that one. Nothing here waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[WorkerRequest | WorkerResponse, list[int], Callable[[], None] | None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closed = False

    def fileno(self) -> int:
        """Readable while there is news, until :meth:`move_to`."""
        return self._wake

    def post(
        self,
        message: WorkerRequest | WorkerResponse,
        descriptors: Sequence[int] = (),
        sent: Callable[[], None] | None = None,
    ) -> None:
        """Send it after all that was posted before. Takes the descriptors over, also when it is closed already."""
        with self._lock:
            if self._is_closed:
                close_all(descriptors)
                return
            if not self._replaces_last(message):
                self._messages.append((message, list(descriptors), sent))
            self.wake()

    def _replaces_last(self, message: WorkerRequest | WorkerResponse) -> bool:
        """How far staging has come is of interest only once: older news that was not sent yet is overwritten."""
        payload = message.payload or {}
        last = (self._messages[-1][0].payload or {}) if self._messages else {}
        if payload.get("event") == "advance" == last.get("event") and last["save"] == payload["save"]:
            last["staged"] = payload["staged"]
            return True
        return False

    def wake(self) -> None:
        """Wake the thread that has the pipe."""
        os.eventfd_write(self._wake, 1)

    def move_to(self, pipe: MessagePipe) -> None:
        """Send as much as the other end has room for; the rest keeps its place. Raises as ``flush`` of the pipe."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        pipe.flush()
        while not pipe.has_unsent:
            with self._lock:
                if not self._messages:
                    return
                message, descriptors, sent = self._messages.popleft()
            pipe.queue(message, descriptors, sent)
            pipe.flush()

    def close(self) -> None:
        """Drop what was not sent."""
        with self._lock:
            self._is_closed = True
            for _, descriptors, _ in self._messages:
                close_all(descriptors)
            self._messages.clear()
            os.close(self._wake)


def close_all(descriptors: Sequence[int] | deque[int]) -> None:
    """Close descriptors; those that are closed already do not matter."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
