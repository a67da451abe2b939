"""Loading checkpoints into the state of a training."""

from functools import partial
from typing import Any

from lastgood._loading.per_rank import PerRankRules, find_rule
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import MissingKeysError, RankMismatchError
from lastgood.manager.catalog import Entry
from lastgood.manager.random_states import RANDOM_STATES_KEY, set_random_states
from lastgood.manager.state import StateTarget


class StateLoader:
    """Reads checkpoints into a state, one after the other until one is good, and puts that in place."""

    def __init__(
        self,
        reader: CheckpointReader,
        world_size: int,
        state: dict[str, Any],
        *,
        random_states: bool,
        strict: bool,
        map_location: Any,
        per_rank: PerRankRules | None = None,
    ) -> None:
        self._per_rank = {} if per_rank is None else per_rank
        self._reader = reader
        self._world_size = world_size
        self._state = state
        self._random_states = random_states
        self._strict = strict
        self._map_location = map_location
        self._target: StateTarget | None = None
        self._reads = 0
        self._missing: list[str] = []

    def read(self, entry: Entry) -> None:
        """Read one; the tensors of the state are filled, or undefined if this raises."""
        if self._random_states and entry.world_size == 1 < self._world_size:
            self._require_rule(entry)
        target = StateTarget(self._state, is_untouched=not self._reads)
        self._reads += 1
        if self._random_states:
            target.target[RANDOM_STATES_KEY] = None
        _, self._missing = self._reader.read(
            entry.path,
            target.target,
            map_location=self._map_location,
            check_keys=partial(self._check_keys, target, entry) if self._strict else None,
            # What one checkpoint has half filled, the next need not hold.
            verify_first=not self._strict,
            # Damage in a part that is not asked for is damage, too.
            verify_whole=True,
            per_rank=self._per_rank,
        )
        self._target = target

    def _require_rule(self, entry: Entry) -> None:
        """Which are per rank cannot be seen from what one rank has saved; of random states it is known."""
        if find_rule(self._per_rank, RANDOM_STATES_KEY) is None:
            raise RankMismatchError(
                f"{entry.path} was saved by one rank, and this run has {self._world_size}: with the one state of its "
                "random number generators they would all draw the same numbers. Nothing has been changed. Pass "
                f"per_rank={{{RANDOM_STATES_KEY!r}: 'leave'}} to go on with the generators as they are, or 'first' to "
                "give all of them that state.",
                path=entry.path,
                phase="restore",
            )

    def _check_keys(self, target: StateTarget, entry: Entry, missing: list[str], unread: list[str]) -> None:
        if RANDOM_STATES_KEY in missing:
            raise MissingKeysError(
                f"{entry.path} was saved without the states of random number generators; nothing has been changed. "
                "Make the manager with random_states=False to resume from it, or pass strict=False.",
                missing_keys=(RANDOM_STATES_KEY,),
                path=entry.path,
            )
        target.check_keys(missing, unread)

    def put(self) -> None:
        """Give the objects of the state what the last call of :meth:`read` has read."""
        if self._target is None:
            return
        loaded = self._target.target
        self._target.put(loaded, self._missing, strict=self._strict)
        if self._random_states and RANDOM_STATES_KEY not in self._missing:
            set_random_states(loaded[RANDOM_STATES_KEY])
