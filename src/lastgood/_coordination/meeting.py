"""One meeting of all ranks over a store: each comes, or gives up for all; the first decision stands."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a meeting ended: all came, if ``reason`` is ``None``; otherwise why not, and who is to blame for it."""

    reason: str | None = None
    missing: tuple[int, ...] = ()

    def encode(self) -> str:
        """For the store, never empty."""
        return json.dumps({"reason": self.reason, "missing": self.missing})

    @staticmethod
    def decode(data: bytes) -> "Outcome":
        found = json.loads(data)
        return Outcome(found["reason"], tuple(found["missing"]))


ALL_CAME = Outcome()

_ALL_CAME = "all came"
_GIVEN_UP = "given up"

_SHORTEST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.001, 0.05
_PAUSE_PER_WAITED = 1 / 8
_LOOKS_PER_SEC = 5000
"""Of all ranks together, at most, while they wait: less than half of what a store answers (docs/scale.md)."""


class Meeting:
    """A rank's view of one meeting, whose keys in ``store`` begin with ``prefix``.

    Raises what the store raises. Nothing here waits, as long as :meth:`outcome` is asked for when there is one.
    """

    def __init__(self, store: Any, prefix: str, rank: int, world_size: int) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._world_size = world_size

    def key(self, *what: object) -> str:
        """The name of something that belongs to this meeting."""
        return "/".join(map(str, (self._prefix, *what)))

    def arrive(self) -> int:
        """Count this rank in; returns how many have come, or 0 if this rank has been here before.

        Whoever finds that all have come decides so (:meth:`decide`).
        """
        if int(self._store.add(self.key("came", self._rank), 1)) > 1:
            return 0
        return int(self._store.add(self.key("number"), 1))

    def decide(self, outcome: Outcome) -> bool:
        """Fix the outcome for all ranks, unless it has been fixed before; true for one of those who tried."""
        if outcome.reason is not None:
            # If two give up at once, either reason is as good.
            self._store.set(self.key("account"), outcome.encode())
        self._store.compare_set(self.key("outcome"), "", _ALL_CAME if outcome.reason is None else _GIVEN_UP)
        # Looked for by those that wait, who then find the outcome and the account that go before it.
        return int(self._store.add(self.key("decided"), 1)) == 1

    @property
    def is_decided(self) -> bool:
        """Whether there is an outcome."""
        return bool(self._store.check([self.key("decided")]))

    def outcome(self) -> Outcome:
        """That which was decided."""
        if self._store.get(self.key("outcome")) != _GIVEN_UP.encode():
            return ALL_CAME
        return Outcome.decode(self._store.get(self.key("account")))

    def missing(self) -> tuple[int, ...]:
        """The ranks that have not come."""
        return self._missing(range(self._world_size))

    def _missing(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The store says only whether all of several keys are there: halve."""
        if self._store.check([self.key("came", rank) for rank in ranks]):
            return ()
        if len(ranks) == 1:
            return tuple(ranks)
        half = len(ranks) // 2
        return self._missing(ranks[:half]) + self._missing(ranks[half:])

    def forget(self) -> None:
        """Take back that this rank came; for a meeting that everybody has left."""
        self._store.delete_key(self.key("came", self._rank))

    def forget_all(self) -> None:
        """Remove what belongs to no single rank; for rank 0, when everybody has left."""
        for what in ("number", "outcome", "account", "decided"):
            self._store.delete_key(self.key(what))


def wait_for(look: Callable[[float], bool], timeout_secs: float, world_size: int) -> bool:
    """Whether ``look`` finds within so long what is waited for; it is told how many seconds are left.

    Looks again and again, ever less often the longer it has waited, and the less often the more ranks there are. The
    store's own wait has no bound: when its time is over, torch warns, and for the warning asks the name service what
    both ends are called, which takes five seconds or more each time wherever nobody answers that.
    """
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        if look(max(0.0, timeout_secs - waited)):
            return True
        if waited >= timeout_secs:
            return False
        left = timeout_secs - (time.monotonic() - begun)
        time.sleep(max(0.0, min(pause_after(waited, world_size), left)))


def pause_after(waited_secs: float, world_size: int) -> float:
    """How long a rank that has waited so long, with all others, leaves the store in peace, in seconds."""
    shortest = max(_SHORTEST_PAUSE_SECS, world_size / _LOOKS_PER_SEC)
    return max(shortest, min(waited_secs * _PAUSE_PER_WAITED, _LONGEST_PAUSE_SECS))


def rank_list(ranks: Sequence[int], at_most: int = 16) -> str:
    """In words; very many are cut off."""
    if not ranks:
        return ""
    listed = ", ".join(map(str, ranks[:at_most]))
    more = f" and {len(ranks) - at_most} more" if len(ranks) > at_most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"
