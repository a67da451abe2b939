"""The arenas of one stager, between one snapshot and the next."""

import threading

import torch

from lastgood._staging.arena import Arena
from lastgood._staging.device_copies import PinnedArena

_SPARE = 64 << 20
"""An arena is kept although it is larger than the snapshot, if not by more than the snapshot's size and this."""


class ArenaPool:
    """The arenas that nobody uses, at most ``kept`` of them."""

    def __init__(self, kept: int, *, pinned: bool) -> None:
        self._kept = kept
        self._pinned = pinned
        self._pins: dict[int, PinnedArena] = {}
        self._lock = threading.RLock()  # reentrant: the garbage collector may give one back in here
        self._free: list[Arena] = []
        self._is_closed = False

    def find(self, plan: int) -> Arena | None:
        """A free arena that is laid out by the plan of this number, for its finder alone."""
        with self._lock:
            for arena in self._free:
                if arena.content is not None and arena.content[0] == plan:
                    self._free.remove(arena)
                    return arena
        return None

    def make(self, size: int, arena: Arena | None) -> Arena:
        """An arena of at least ``size`` bytes, reserved: the given one, a free one, or a new one."""
        if arena is None:
            with self._lock:
                arena = self._free.pop() if self._free else None
        if arena is None:
            arena = Arena()
        try:
            if not size <= arena.size <= 2 * size + _SPARE:
                self._unpin(arena)
                arena.resize(size)
            arena.reserve(size)
            if self._pinned:
                self._pins.setdefault(arena.number, PinnedArena(torch.cuda)).register(arena)
        except BaseException:
            self._close(arena)
            raise
        return arena

    def give_back(self, arena: Arena | None, reusable: bool = True) -> None:
        """Take back an arena; one that somebody may still read, or that is too many, is given up."""
        if arena is None:
            return
        with self._lock:
            if reusable and not self._is_closed and len(self._free) < self._kept:
                self._free.append(arena)
                return
        self._close(arena, unused=reusable)

    def close(self) -> None:
        """Give up those that are free now, and each that is given back later."""
        with self._lock:
            self._is_closed = True
            free, self._free = self._free, []
        for arena in free:
            self._close(arena)

    def _close(self, arena: Arena, *, unused: bool = True) -> None:
        self._unpin(arena)
        arena.close(unused=unused)

    def _unpin(self, arena: Arena) -> None:
        pin = self._pins.pop(arena.number, None)
        if pin is not None:
            pin.unregister()
