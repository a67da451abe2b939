"""Disks that are full, or may not be written: what runs in a process that has a small file system to itself."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import read, save, state_of, writer_of
from tests.helpers.workers import Worker

import lastgood
from lastgood.errors import StorageError

MIB = 1 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
NOBODY = 65534


def mount_small_disk(directory: str) -> str | None:
    """Mount 16 MiB of tmpfs that only this process sees; why that is not possible here, if it is not."""
    return mount_for_this_process("-t", "tmpfs", "-o", "size=16m", "tmpfs", directory)


def mount_for_this_process(*arguments: str) -> str | None:
    """Mount something that only this process sees; why that is not possible here, if it is not."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER) != 0:
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for command in (["mount", "--make-rprivate", "/"], ["mount", *arguments]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            return done.stderr
    return None


def elements_of(mib: int) -> int:
    return mib * MIB // 4


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


def seen_by(worker: Worker, scenario: Any, directory: Path) -> dict[str, Any]:
    seen: dict[str, Any] = worker.call(scenario, str(directory))
    if "skip" in seen:
        pytest.skip(f"a file system of its own cannot be mounted here: {seen['skip']}")
    return seen
