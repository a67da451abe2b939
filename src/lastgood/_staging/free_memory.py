"""How much memory there is for a snapshot: asked for before it is touched, since too late means the kernel's killer."""

import os

_CGROUP_ROOT = "/sys/fs/cgroup"


def available_memory() -> int | None:
    """Bytes that may still be used by this process: by the machine, and by every cgroup around it; ``None`` if unknown.

    Page cache counts as free, since the kernel gives it up.
    """
    known = [limit for limit in (_of_machine(), *_of_cgroups()) if limit is not None]
    return min(known, default=None)


def machine_available(meminfo: str) -> int | None:
    """``MemAvailable`` of the text of ``/proc/meminfo``, in bytes."""
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def cgroup_available(limit: str, used: str, stat: str) -> int | None:
    """What a cgroup leaves, from the texts of its limit, its use and its ``memory.stat``; ``None`` without a limit."""
    if not limit.strip().isdigit() or int(limit) >= 1 << 60:  # "max", and what version 1 writes for it
        return None
    reclaimable = 0
    for line in stat.splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "active_file"):
            reclaimable += int(value)
    return max(0, int(limit) - int(used) + reclaimable)


def _of_machine() -> int | None:
    text = _read("/proc/meminfo")
    return None if text is None else machine_available(text)


def _of_cgroups() -> list[int | None]:
    found = []
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current")
            root = _CGROUP_ROOT if os.path.exists(f"{_CGROUP_ROOT}/cgroup.controllers") else f"{_CGROUP_ROOT}/unified"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = f"{_CGROUP_ROOT}/memory"
        else:
            continue
        # Inside a container the path may be that of the host: the directory is then the root.
        directory = root + path.rstrip("/")
        while len(directory) >= len(root):
            texts = [_read(f"{directory}/{name}") for name in (*names, "memory.stat")]
            if texts[0] is not None and texts[1] is not None:
                found.append(cgroup_available(texts[0], texts[1], texts[2] or ""))
            directory = os.path.dirname(directory)
    return found


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None
