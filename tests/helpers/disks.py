"""File systems of one process's own: what it mounts there, no other process sees."""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.workers import Worker

MIB = 1 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


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


def seen_by(worker: Worker, scenario: Any, directory: Path) -> dict[str, Any]:
    seen: dict[str, Any] = worker.call(scenario, str(directory))
    if "skip" in seen:
        pytest.skip(f"a file system of its own cannot be mounted here: {seen['skip']}")
    return seen
