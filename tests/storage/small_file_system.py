"""What happens on a file system that is full or read-only: run by the tests, in a mount namespace of its own.

Arguments: the name of a scenario, and a directory where 8 MiB of tmpfs are mounted that nobody else sees. Prints what
it saw, as JSON.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable

from lastgood.errors import StorageError
from lastgood.storage.file_ops import OsFileOps
from lastgood.storage.local import LocalStorage
from lastgood.testing.storage_backend_tests import read_all

MIB = 1 << 20


class CannotReserve(OsFileOps):
    def reserve(self, descriptor: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class DoesNotKnowWhatIsFree(OsFileOps):
    def available_bytes(self, path: str) -> int | None:
        return None


def failure_of(action: Callable[[], object]) -> dict[str, object]:
    try:
        action()
    except StorageError as error:
        return {"errno": error.errno, "message": str(error), "path": error.path}
    return {"errno": None}


def report(directory: str, **seen: object) -> None:
    storage = LocalStorage()
    old = read_all(storage, f"{directory}/file")
    print(json.dumps({**seen, "names": sorted(os.listdir(directory)), "old_intact": old == b"old"}))


def too_large(directory: str) -> None:
    """A file larger than what is free is refused before anything is made; a smaller one goes well afterwards."""
    storage = LocalStorage()
    storage.put(f"{directory}/file", b"old")
    failure = failure_of(lambda: storage.begin(f"{directory}/new/file", 20 * MIB))
    again = failure_of(lambda: storage.begin(f"{directory}/file", 20 * MIB))
    free = os.statvfs(directory)
    storage.put(f"{directory}/smaller", bytes(4 * MIB))
    report(directory, failure=failure, again=again, free=free.f_bavail * free.f_frsize)


def full_while_writing(directory: str) -> None:
    """The space that was free at the beginning is taken by another file in the middle, and was not reserved."""
    storage = LocalStorage(CannotReserve())
    storage.put(f"{directory}/file", b"old")
    write = storage.begin(f"{directory}/file", 6 * MIB)
    write.write_at(0, memoryview(bytes(2 * MIB)))
    with open(f"{directory}/another", "wb") as another:
        another.write(bytes(4 * MIB))
    failure = failure_of(lambda: write.write_at(2 * MIB, memoryview(bytes(4 * MIB))))
    write.abort()
    os.unlink(f"{directory}/another")
    after = failure_of(lambda: storage.put(f"{directory}/next", bytes(6 * MIB)))
    report(directory, failure=failure, after=after)


def reservation_fails(directory: str) -> None:
    """The file system does not tell what is free: reserving the space finds it out, still before a byte is written."""
    storage = LocalStorage(DoesNotKnowWhatIsFree())
    storage.put(f"{directory}/file", b"old")
    report(directory, failure=failure_of(lambda: storage.begin(f"{directory}/file", 20 * MIB)))


def reserved(directory: str) -> None:
    """What was begun has its space: a file that comes later gets none of it."""
    storage = LocalStorage()
    storage.put(f"{directory}/file", b"old")
    write = storage.begin(f"{directory}/first", 6 * MIB)
    failure = failure_of(lambda: storage.begin(f"{directory}/second", 6 * MIB))
    write.write_at(0, memoryview(bytes(6 * MIB)))
    write.commit()
    report(directory, failure=failure)


def debris_is_cleared_first(directory: str) -> None:
    """What a dead writer left behind does not make the disk too full for the next save of that name."""
    storage = LocalStorage()
    storage.put(f"{directory}/file", b"old")
    with open(f"{directory}/.next.0123456789abcdef.tmp", "wb") as debris:
        debris.write(bytes(5 * MIB))
    report(directory, failure=failure_of(lambda: storage.put(f"{directory}/next", bytes(6 * MIB))))


def read_only(directory: str) -> None:
    storage = LocalStorage()
    storage.put(f"{directory}/file", b"old")
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True, timeout=60)
    report(
        directory,
        failure=failure_of(lambda: storage.put(f"{directory}/file", b"new")),
        in_new_directory=failure_of(lambda: storage.put(f"{directory}/new/file", b"new")),
        delete=failure_of(lambda: storage.delete(f"{directory}/file")),
    )


SCENARIOS = (too_large, full_while_writing, reservation_fails, reserved, debris_is_cleared_first, read_only)

if __name__ == "__main__":
    {scenario.__name__: scenario for scenario in SCENARIOS}[sys.argv[1]](sys.argv[2])
