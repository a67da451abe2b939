"""Disks that are full, or may not be written: what runs in a process that has a small file system to itself."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.disks import MIB, elements_of, mount_small_disk
from tests.helpers.saves import read, save, state_of, writer_of

import lastgood
from lastgood.errors import StorageError

NOBODY = 65534


def failure_of(action: Callable[[], object]) -> StorageError | None:
    try:
        action()
    except StorageError as error:
        return error
    return None


def look(path: str) -> dict[str, Any]:
    return {"names": sorted(os.listdir(path)), "number": read(path)["step"]}


def full_disk(directory: str) -> dict[str, Any]:
    """6 of 16 MiB are taken by a checkpoint, which one of 12 MiB is to replace."""
    skip = mount_small_disk(directory)
    if skip is not None:
        return {"skip": skip}
    path = f"{directory}/checkpoint"
    writer = writer_of()
    writer.write(path, state_of(1, elements_of(6)))
    free = os.statvfs(directory)
    seen: dict[str, Any] = {"free": free.f_bavail * free.f_frsize}
    seen["too large"] = failure_of(lambda: writer.write(path, state_of(2, elements_of(12))))
    seen["after too large"] = look(path)
    seen["single file"] = failure_of(lambda: lastgood.save(state_of(2, elements_of(12)), f"{directory}/state.pt"))
    seen["names"] = os.listdir(directory)
    filler = Path(directory, "filler")
    filler.write_bytes(bytes(8 * MIB))
    seen["filled"] = failure_of(lambda: writer.write(path, state_of(3, elements_of(6))))
    seen["after filled"] = look(path)
    filler.unlink()
    seen["freed"] = failure_of(lambda: writer.write(path, state_of(4, elements_of(6))))
    seen["after freed"] = look(path)
    return seen


def read_only_disk(directory: str) -> dict[str, Any]:
    skip = mount_small_disk(directory)
    if skip is not None:
        return {"skip": skip}
    path = f"{directory}/checkpoint"
    save(path, 1)
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True, timeout=60)
    failure = failure_of(lambda: save(path, 2))
    return {"failure": failure, **look(path)}


def read_only_directory(directory: str) -> dict[str, Any]:
    """Without write permission. Root has it everywhere, so root becomes nobody first."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    failure = failure_of(lambda: save(directory, 2))
    single = failure_of(lambda: lastgood.save(state_of(2), f"{directory}/state.pt"))
    return {"failure": failure, "single file": single, **look(directory)}
