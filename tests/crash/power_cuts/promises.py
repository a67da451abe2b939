"""What a run has promised by a moment, read from the notes in its record; and what may be found when the power is cut.

A *number* stands for a state: :func:`~tests.manager.runs.tiny` makes it, and finds it again in what was loaded.
"""

from collections.abc import Iterable, Sequence
from typing import Any

SAVING, DURABLE, FAILED = "saving", "durable", "failed"
SETTING_ASIDE, SET_ASIDE = "setting aside", "set aside"
PRUNING, PRUNED = "pruning", "pruned"
KEEPING = "keeping"
KILLED = "killed"


class Promises:
    """What may be found, by step.

    ``numbers``: for each step, which states may be found as its checkpoint; ``None`` among them: or none at all.
    ``keep``: of how many steps the newest stay (``None``: all). ``under_way``: the step that is being saved.
    ``set_aside``: the steps that have been set aside, each with what may be found there. ``killed``: steps whose save
    died with its process: those who come after it may find it, and it may be gone after a power cut all the same.
    ``removed``: steps of which nothing is left, not even a directory.
    """

    def __init__(self, notes: Iterable[tuple[Any, ...]]) -> None:
        self.keep: int | None = None
        self.numbers: dict[int, set[int | None]] = {}
        self.under_way: int | None = None
        self.set_aside: list[tuple[int, set[int | None]]] = []
        self.killed: set[int] = set()
        self.removed: set[int] = set()
        self._displaced: dict[int, set[int]] = {}
        """Steps that retention may have removed, each with those that it counted instead, if they were there."""
        self._being_set_aside: set[int | None] = set()
        self._being_removed: set[int] = set()
        for note in notes:
            self.note(*note)

    def note(self, kind: str, *facts: Any) -> None:
        """Take in one more."""
        getattr(self, "_" + kind.replace(" ", "_"))(*facts)

    @property
    def certain(self) -> set[int]:
        """The steps whose checkpoint has to be there."""
        return {step for step, numbers in self.numbers.items() if None not in numbers}

    def required(self, there: Iterable[int]) -> set[int]:
        """The steps whose checkpoint retention must not have removed, if those are there."""
        known = self.certain | set(there)
        # Retention may have counted, among those that it keeps, one that nobody was promised; now or earlier.
        kept = self.certain & self.newest(known)
        return {step for step in kept if self._displaced.get(step, set()).isdisjoint(there)}

    def newest(self, steps: Iterable[int]) -> set[int]:
        """Those of the steps that retention keeps, whatever else there is."""
        ordered = sorted(set(steps))
        return set(ordered if self.keep is None else ordered[-self.keep :])

    def _keeping(self, keep: int | None) -> None:
        self.keep = keep

    def _saving(self, step: int, number: int) -> None:
        self.numbers.setdefault(step, {None}).add(number)
        self.removed.discard(step)
        self.under_way = step

    def _durable(self, step: int, number: int) -> None:
        self.numbers[step] = {number}
        self.under_way = None
        # Those that are not kept may be gone, from the moment on at which this one is there.
        self.killed.discard(step)
        self._displaced.pop(step, None)
        for other in self.certain - self.required([step]) - {step}:
            self.numbers[other].add(None)
        self._note_displaced([step])

    def _note_displaced(self, there: Sequence[int]) -> None:
        """What retention removes now if it finds what a killed process has saved."""
        for killed in self.killed:
            for other in self.certain - self.newest({*self.certain, *there, killed}):
                self._displaced.setdefault(other, set()).add(killed)

    def _killed(self) -> None:
        if self.under_way is not None:
            self.killed.add(self.under_way)

    def _failed(self, step: int, number: int) -> None:
        """Before it was published."""
        self.numbers[step].discard(number)
        self.under_way = None

    def _setting_aside(self, step: int) -> None:
        self._being_set_aside = set(self.numbers[step])
        self.numbers[step].add(None)
        # What is set aside was there, also if only a killed process had saved it.
        for other, killed in self._displaced.items():
            if step in killed:
                self.numbers[other].add(None)

    def _set_aside(self, step: int) -> None:
        self.set_aside.append((step, self._being_set_aside))
        self.numbers[step] = {None}

    def _pruning(self, keep: int) -> None:
        self.keep = keep
        self._being_removed = self.certain - self.newest(self.certain)
        for step in set(self.numbers) - self.required(()):
            self.numbers[step].add(None)
        self._note_displaced(())

    def _pruned(self) -> None:
        for step in self._being_removed:
            self.numbers[step] = {None}
        self.removed |= self._being_removed


def promises_of(there: dict[int, int], *, keep: int | None = None) -> Promises:
    """Those of what has been found, by step: it is all there is, and all of it is certain."""
    return Promises([(KEEPING, keep), *((DURABLE, *each) for each in sorted(there.items()))])
