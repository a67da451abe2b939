"""How much more memory a call takes at its peak than was in use before it."""

from collections.abc import Callable

from timing import release_memory


def extra_peak_bytes(run: Callable[[], object]) -> int:
    """Resident memory at the call's peak, less that before it; by the kernel's own high-water mark."""
    release_memory()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the mark falls back to what is resident now
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
