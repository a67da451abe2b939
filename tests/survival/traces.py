"""What a death may leave behind: processes, shared memory, temporaries, locks. And how to wait for the end of one."""

import contextlib
import os
import select
import signal
from pathlib import Path

from tests.helpers.workers import PATIENCE_SECS

_SHARED = "/memfd:lastgood"


class ProcessEnd:
    """Waits for the end of a process that may be anybody's child, any number of times.

    Its number may be another's once it has ended, and soon is where many processes and threads come and go.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def __enter__(self) -> "ProcessEnd":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._pidfd)

    def wait(self, secs: float = PATIENCE_SECS) -> bool:
        """Whether it has come within that time."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(secs * 1000))

    def send_signal(self, number: int) -> None:
        """To this process alone: where it has ended, to none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


def shared_memory(pid: int) -> dict[int, int]:
    """lastgood's anonymous files that a process has open: for the number of each, the bytes that it takes."""
    found: dict[int, int] = {}
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed this very moment
            name = f"/proc/{pid}/fd/{descriptor}"
            if os.readlink(name).startswith(_SHARED):
                status = os.stat(name)
                found[status.st_ino] = 512 * status.st_blocks
    return found


def mapped_shared_memory(pid: int) -> dict[int, int]:
    """The same for those that it has mapped: the bytes that are mapped."""
    found: dict[int, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(_SHARED):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            number = int(fields[4])
            found[number] = found.get(number, 0) + end - start
    return found


def address_space(pid: int) -> int:
    """The bytes of addresses that a process has in use."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def holders(files: set[int]) -> list[int]:
    """Processes that have one of these anonymous files open or mapped."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            # It may end meanwhile, or belong to another user.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                held = shared_memory(int(name)).keys() | mapped_shared_memory(int(name)).keys()
                if held & files:
                    found.append(int(name))
    return found


def names(path: Path) -> list[str]:
    """Everything in a directory, hidden or not: temporaries and locks too."""
    return sorted(os.listdir(path))
