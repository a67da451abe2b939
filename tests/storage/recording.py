"""A door to the operating system that remembers what went through it, and can be told to behave badly."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lastgood._memory import address_of
from lastgood.storage._direct_io import ALIGNMENT
from lastgood.storage.file_ops import OsFileOps


class Call(NamedTuple):
    name: str
    path: str
    arguments: tuple[Any, ...]


class RecordingFileOps:
    """The real operations, each noted in ``calls`` before it is done.

    ``paths`` tells which path each descriptor was opened with, ``direct`` which descriptors go past the page cache.
    ``replace_call("fsync", f)`` puts ``f(real, *arguments)`` in the place of an operation.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.paths: dict[int, str] = {}
        self.direct: set[int] = set()
        self._real = OsFileOps()
        self._stand_ins: dict[str, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def replace_call(self, name: str, stand_in: Callable[..., Any]) -> None:
        self._stand_ins[name] = stand_in

    def fail(self, name: str, number: int) -> None:
        """From now on the operation fails with this errno, without being done."""

        def failing(real: Callable[..., Any], *arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        self.replace_call(name, failing)

    def heal(self, name: str) -> None:
        del self._stand_ins[name]

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def _check_alignment(self, buffer: memoryview, offset: int) -> None:
        # Storage would take the kernel's refusal for a file system without direct I/O, and go on, slowly.
        for number in (address_of(buffer), offset, len(buffer)):
            assert number % ALIGNMENT == 0, (
                f"direct I/O of {len(buffer)} bytes at {offset}, memory {address_of(buffer)}"
            )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real = getattr(self._real, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            arguments += tuple(options.values())
            target = arguments[0]
            with self._lock:
                path = self.paths.get(target, "?") if isinstance(target, int) else target
                self.calls.append(Call(name, path, arguments))
            if target in self.direct and name in ("pwrite", "pread_into"):
                self._check_alignment(*arguments[1:])
            stand_in = self._stand_ins.get(name)
            result = real(*arguments) if stand_in is None else stand_in(real, *arguments)
            if name.startswith("open_"):
                with self._lock:
                    self.paths[result] = target
                    (self.direct.add if name == "open_direct" else self.direct.discard)(result)
            return result

        return recorded


def refuse_direct_at_open(ops: RecordingFileOps) -> None:
    ops.fail("open_direct", errno.EINVAL)


def refuse_direct_when_used(ops: RecordingFileOps) -> None:
    """Direct I/O can be opened, but every read and write says EINVAL: what some file systems do."""

    def refusing(real: Callable[..., Any], descriptor: int, *arguments: Any) -> Any:
        if descriptor in ops.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, *arguments)

    ops.replace_call("pwrite", refusing)
    ops.replace_call("pread_into", refusing)


def has_direct_io(directory: str) -> bool:
    """Whether the file system of a directory takes direct I/O."""
    ops = OsFileOps()
    path = os.path.join(directory, "probe")
    ops.close(ops.open_exclusive(path))
    try:
        ops.close(ops.open_direct(path, write=True))
    except OSError:
        return False
    finally:
        ops.unlink(path)
    return True


def drop_from_page_cache(path: Path) -> None:
    """Let the next reads of a file go to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def descriptors_left_open(ops: RecordingFileOps) -> set[int]:
    """Those opened through ``ops`` and never closed."""
    still_open: set[int] = set()
    for descriptor, path in ops.paths.items():
        opened = sum(call.name.startswith("open_") and call.path == path for call in ops.calls)
        closed = sum(call.name == "close" and call.path == path for call in ops.calls)
        if closed < opened:
            still_open.add(descriptor)
    return still_open
