"""What shows that a tensor changed between the call for a snapshot and the end of its copy.

Version counters catch what autograd knows of. Kernels that write past it (fused optimizers, batch normalisation,
``.data``) are caught by samples: SAMPLES lines of LINE bytes of each storage, evenly spaced from a random start. A
change of a contiguous part of more than 1 / SAMPLES of a storage and a line is always seen; one that touches a share f
of the lines, spread at random, goes unseen with a probability of (1 - f) ** SAMPLES. Of storages that are smaller than
so many lines, every byte is compared.
"""

import ctypes
import itertools
import random
from collections import deque

import torch

from lastgood._memory import address_of, memory_at
from lastgood._staging.plan import Taken
from lastgood._torch_internals import version_of
from lastgood.errors import TornSnapshotError
from lastgood.format.nodes import first_paths
from lastgood.format.spec import crc32

SAMPLES = 16
LINE = 64

_random = random.Random()  # a generator of our own: the user's sequences must not depend on their checkpoints


class Witnesses:
    """Taken at the moment of the call, of those storages of ``taken`` whose numbers are given."""

    def __init__(self, taken: Taken, storages: list[int], *, full_check: bool) -> None:
        self._taken = taken
        self._versions: dict[int, list[tuple[torch.Tensor, int | None]]] = {}
        self._sampled: dict[int, tuple[range, int]] = {}
        self._checksums: dict[int, int] = {}
        self._memory = {
            number: (storage, storage.data_ptr(), storage.nbytes())
            for number in storages
            if (storage := taken.storages.get(number)) is not None
        }
        sources: list[int] = []
        for number in storages:
            self._versions[number] = [(tensor, version_of(tensor)) for tensor in taken.tensors.get(number, ())]
            address, size = taken.addresses[number], taken.plan.sizes[number]
            if number in taken.device_parts:
                continue  # its bytes cannot be looked at without waiting for the device
            if full_check or size < SAMPLES * LINE:
                self._checksums[number] = crc32(memory_at(address, size))
            else:
                offsets = _sample_offsets(size)
                self._sampled[number] = offsets, LINE * len(sources)
                sources += map(address.__add__, offsets)
        self._samples = _gather(sources)

    def require_memory(self, number: int) -> None:
        """Raise as :meth:`check` does if storage ``number`` has been resized or freed: its address leads nowhere then.

        What is resized between this and a copy of the next piece is still read. Storages stay where they are unless
        somebody resizes them, for as long as the snapshot holds them.
        """
        known = self._memory.get(number)
        if known is not None and (known[0].data_ptr(), known[0].nbytes()) != known[1:]:
            raise self._torn(number)

    def check(self, number: int, copy: int) -> None:
        """Compare with the copy of storage ``number``, which has just been made at the address ``copy``.

        Raises :class:`~lastgood.errors.TornSnapshotError` naming a tensor on it.
        """
        changed = any(version_of(tensor) != version for tensor, version in self._versions.get(number, ()))
        if number in self._sampled:
            offsets, start = self._sampled[number]
            lines = _gather(list(map(copy.__add__, offsets)))
            changed = changed or lines != self._samples[start : start + len(lines)]
        if number in self._checksums:
            changed = changed or crc32(memory_at(copy, self._taken.plan.sizes[number])) != self._checksums[number]
        if changed:
            raise self._torn(number)

    def _torn(self, number: int) -> TornSnapshotError:
        name = first_paths(self._taken.plan.index.root).get(number, f"storage {number}")
        return TornSnapshotError(
            f"the tensor {name!r} changed after save was called and before it was copied; the snapshot was thrown "
            "away, nothing of it is published, earlier checkpoints are untouched. Optimizers' steps wait by "
            "themselves; do any other update inside `with checkpointer.hold():`, or wait for the stage future first.",
            tensor=name,
            phase="stage",
        )


def _sample_offsets(size: int) -> range:
    """Where the sampled lines of a storage begin."""
    lines = size // LINE
    if not lines:
        return range(0)
    step = -(-lines // SAMPLES)
    return range(_random.randrange(step) * LINE, lines * LINE, step * LINE)


def _gather(addresses: list[int]) -> bytearray:
    """The lines at these addresses, one after the other."""
    gathered = bytearray(LINE * len(addresses))
    base = address_of(gathered)
    deque(map(ctypes.memmove, range(base, base + len(gathered), LINE), addresses, itertools.repeat(LINE)), 0)
    return gathered
