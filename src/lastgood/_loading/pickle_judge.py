"""What all rules for pickles have in common: how they refuse one, and how much work they allow it."""

from typing import ClassVar, NoReturn

from lastgood.errors import UnsafeCheckpointError, corrupt

_SPARE_WORK = 1024 * 1024


class PickleJudge:
    """Refuses pickles of one file. ``size``, in bytes, bounds the work that they cause by copying what they hold."""

    refusal: ClassVar[str] = "is not safe to load"

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._work_left = 4 * size + _SPARE_WORK

    def unsafe(self, what: str) -> NoReturn:
        """Refuse the pickle for what it would do."""
        raise UnsafeCheckpointError(
            f"{self._path} {self.refusal}: its pickle {what}. torch.save writes nothing like it; nothing of the "
            "file was run or loaded.",
            path=self._path,
        )

    def broken(self, what: str) -> NoReturn:
        """Refuse the pickle for what cannot be."""
        raise corrupt(self._path, f"its pickle cannot be right: {what}")

    def _spend(self, cost: int) -> None:
        """Count work that the number of opcodes does not bound."""
        self._work_left -= cost
        if self._work_left < 0:
            self.unsafe("makes copies of the same large values again and again")
