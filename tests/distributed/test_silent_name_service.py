"""Where the name service becomes silent: ranks wait no longer than they were told to.

torch asks it for the names of both ends of a connection whenever its store's own wait is over.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import make_together, meet, reserved_port, start, store_arguments
from tests.helpers.disks import mount_for_this_process
from tests.helpers.workers import Worker

_NAME_SERVER = ("127.0.0.53", 53)
_SILENCE_SECS = 3
_WAIT_SECS = 0.5


def wait_among_nameless(directory: str) -> dict[str, Any]:
    """What ranks 0 and 2 of 3 were told, and how long they waited, where addresses have no names any more."""
    configuration = Path(directory, "resolv.conf")
    configuration.write_text(f"nameserver {_NAME_SERVER[0]}\noptions timeout:{_SILENCE_SECS} attempts:1\n")
    skip = mount_for_this_process("--bind", str(configuration), "/etc/resolv.conf")
    if skip is not None:
        return {"skip": skip}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service, reserved_port() as port:
        try:
            service.bind(_NAME_SERVER)
        except OSError as error:
            return {"skip": f"no name service can be set up at {_NAME_SERVER}: {error}"}
        is_silent = threading.Event()
        start(say_that_there_is_no_name, service, is_silent)
        ranks = make_together([store_arguments(rank, 3, port, timeout_secs=_WAIT_SECS) for rank in range(3)])
        is_silent.set()
        asked_secs, _ = timed(ask_for_a_name)
        waited_secs, errors = timed(lambda: meet([ranks[0], ranks[2]]))
    return {"asked_secs": asked_secs, "waited_secs": waited_secs, "errors": [repr(error) for error in errors]}


def say_that_there_is_no_name(service: socket.socket, is_silent: threading.Event) -> None:
    """Answer queries as RFC 1035 says, with the query itself and response code 3, until told to be silent."""
    while not is_silent.is_set():
        query, client = service.recvfrom(4096)
        if not is_silent.is_set():
            service.sendto(query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + query[12:], client)


def ask_for_a_name() -> None:
    with contextlib.suppress(socket.gaierror):
        socket.getnameinfo(("192.0.2.1", 80), 0)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.monotonic()
    result = action()
    return time.monotonic() - begun, result


def test_ranks_do_not_wait_for_a_name_service_that_says_nothing(tmp_path: Path) -> None:
    worker = Worker()
    try:
        found = worker.call(wait_among_nameless, str(tmp_path))
    finally:
        worker.kill()
    if "skip" in found:
        pytest.skip(found["skip"])
    assert found["asked_secs"] > _SILENCE_SECS / 2, "the name service is not silent: this test shows nothing"
    assert found["waited_secs"] < _SILENCE_SECS
    for error in found["errors"]:
        assert "waited 0.5 s for rank 1" in error
