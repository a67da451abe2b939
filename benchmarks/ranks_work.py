"""What one rank does when it is asked to; all ranks are asked at the same time."""

import os
import time
from dataclasses import dataclass, field

import process_tree
import torch
import torch.distributed as dist
from async_savers import AsyncSaver
from ranks_savers import GROUP_TIMEOUT, LOADER_OF, LOADERS, SAVERS, wait_durable
from ranks_states import SAME, Training, Tree, empty_like, require_loaded, whole_bytes
from timing import release_memory

_MOST_SECONDS_UNTIL_REST = 60.0
_SECONDS_AT_REST = 0.05
"""Of processor time in one second: less than that is none."""


@dataclass(frozen=True)
class Times:
    """Of one rank, by a clock that all processes of the machine share, from the barrier on."""

    start: float
    returned: float
    staged: float
    durable: float

    cpu: float
    """Of this rank and its processes, from the barrier on."""

    written_bytes: int = 0
    """By them, as the kernel counts what goes to a disk."""


@dataclass
class _Rank:
    """What this process keeps."""

    training: Training | None = None
    savers: dict[str, AsyncSaver] = field(default_factory=dict)
    targets: dict[str, Tree] = field(default_factory=dict)

    def tree(self) -> Tree:
        if self.training is None:
            raise RuntimeError("there is no training yet")
        return self.training.tree()

    def target(self, place: str) -> Tree:
        if place not in self.targets:
            self.targets[place] = empty_like(self.tree(), place)
        return self.targets[place]


_here = _Rank()


def join(rank: int, world_size: int, rendezvous: str) -> None:
    """Become a rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT
    )


def leave() -> None:
    """Close what is open; the process ends then."""
    for name in list(_here.savers):
        close_saver(name)
    dist.destroy_process_group()


def build(nbytes: int, replicas: int) -> int:
    """Make the state that is saved. Returns its bytes, those of all ranks together and each counted once."""
    _here.targets.clear()
    _here.training = None
    release_memory()
    _here.training = Training(nbytes, replicas)
    return whole_bytes(_here.tree())


def open_saver(name: str) -> None:
    """Make one. Its process, if it has one, may import and connect something in the background: that is waited for."""
    _here.savers[name] = SAVERS[name]()
    _wait_until_processes_rest()


def close_saver(name: str) -> None:
    """Close one, if it was made."""
    saver = _here.savers.pop(name, None)
    if saver is not None:
        saver.close()


def save(name: str, path: str, timeout: float) -> Times:
    """Save once, and wait until that is durable."""
    saver, tree = _here.savers[name], _here.tree()
    release_memory()
    written, cpu = _written_bytes(), process_tree.cpu_seconds()
    dist.barrier()
    start = time.perf_counter()
    pending = saver.save(path, tree)
    returned = time.perf_counter()
    pending.wait_staged(timeout)
    staged = time.perf_counter()
    wait_durable(saver, pending, path, timeout)
    durable = time.perf_counter()
    cpu = process_tree.cpu_seconds() - cpu
    return Times(start, returned, staged, durable, cpu, _written_bytes() - written)


def load(name: str, path: str, place: str) -> Times:
    """Load once, into what was there before."""
    target = _here.target(place)
    release_memory()
    cpu = process_tree.cpu_seconds()
    dist.barrier()
    start = time.perf_counter()
    LOADERS[name](path, target)
    end = time.perf_counter()
    return Times(start, end, end, end, process_tree.cpu_seconds() - cpu)


def require_saved(name: str, path: str) -> None:
    """Raise ``ValueError`` unless what this saver has written loads, to the bit."""
    load(LOADER_OF[name], path, SAME)
    check(SAME)


def check(place: str) -> None:
    """Raise ``ValueError`` unless the target has every bit that was saved; the next load has to bring them itself."""
    require_loaded(_here.targets.pop(place), _here.tree())


def forget_targets() -> None:
    """Free their memory."""
    _here.targets.clear()
    release_memory()


def _wait_until_processes_rest() -> None:
    """Those of all ranks: while one of them still imports, another may get no processor, and only seem to rest."""
    deadline = time.monotonic() + _MOST_SECONDS_UNTIL_REST
    last = -1.0
    while True:
        used = process_tree.cpu_seconds() - time.process_time()
        is_late = time.monotonic() > deadline
        of_all = torch.tensor([0.0 if is_late else used - last if last >= 0 else 1.0])
        dist.all_reduce(of_all)
        if of_all.item() < _SECONDS_AT_REST:
            return
        last = used
        time.sleep(1.0)


def _written_bytes() -> int:
    total = 0
    for pid in (os.getpid(), *process_tree.descendants()):
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
        total += int(fields["write_bytes"])
    return total
