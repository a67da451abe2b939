"""Measuring contenders in turns, so that a slow minute of the machine hits all of them."""

import ctypes
import gc
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from page_cache import PageCacheError

_LONGEST_REASON = 200


@dataclass(frozen=True)
class Contender:
    """Something to be timed. Only ``run`` is inside of the timing."""

    name: str
    run: Callable[[], Any]
    before: Callable[[], None] = lambda: None
    check: Callable[[Any], None] = lambda result: None
    """Looks at the result of the first, unmeasured run."""
    after: Callable[[], None] = lambda: None
    required: bool = False
    """Whether its failure ends the whole run; otherwise it is left out, and said to be."""


@dataclass
class Samples:
    """What one contender took, one entry a round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


Results = dict[str, Samples]


def measure_in_turns(
    what: str, contenders: Sequence[Contender], rounds: int, *, touched_bytes: int
) -> tuple[Results, dict[str, str]]:
    """Run every contender once unmeasured, checking its result, then ``rounds`` times: A B C A B C ...

    Before each run ``touched_bytes`` of memory are used and freed. Returns the samples, and for each contender that
    could not take part the reason.
    """
    left_out: dict[str, str] = {}
    for contender in contenders:
        progress(f"{what}: warming up: {contender.name}")
        try:
            _run_once(contender, touched_bytes, check=True)
        except Exception as error:
            if contender.required and not isinstance(error, PageCacheError):
                raise
            left_out[contender.name] = reason(error)
    running = [contender for contender in contenders if contender.name not in left_out]
    results = {contender.name: Samples() for contender in running}
    for number in range(1, rounds + 1):
        for contender in running:
            progress(f"{what}: round {number} of {rounds}: {contender.name}")
            seconds, cpu_seconds = _run_once(contender, touched_bytes, check=False)
            results[contender.name].seconds.append(seconds)
            results[contender.name].cpu_seconds.append(cpu_seconds)
    progress("")
    return results, left_out


def _run_once(contender: Contender, touched_bytes: int, *, check: bool) -> tuple[float, float]:
    contender.before()
    settle(touched_bytes)
    try:
        seconds, cpu_seconds, result = _timed(contender.run)
        if check:
            contender.check(result)
        return seconds, cpu_seconds
    finally:
        contender.after()


def _timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    cpu_start, start = _cpu_seconds(), time.perf_counter()
    result = run()
    return time.perf_counter() - start, _cpu_seconds() - cpu_start, result


def _cpu_seconds() -> float:
    """User and system time of this process and of the children that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def settle(touched_bytes: int) -> None:
    """The same start for everyone: no garbage, no memory kept by the allocator, no dirty pages of somebody else."""
    release_memory()
    os.sync()
    if touched_bytes:
        _touch_memory(touched_bytes)


def _touch_memory(nbytes: int) -> None:
    """Use memory once and free it. A virtual machine may have given its free memory back to the host, and getting
    it again can take longer than a whole load: chance would decide who pays for that."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, nbytes)
        del first  # the mapping cannot be closed while something points into it


def reason(error: BaseException) -> str:
    """Why something was left out, in one line: of an error that brings along a traceback, the last one."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[-1].strip()}"
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."


def release_memory() -> None:
    """Collect garbage and give freed memory back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library alone
    if trim is not None:
        trim(0)


def progress(line: str) -> None:
    """Show what is being done, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
