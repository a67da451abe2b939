"""What may happen to a file operation, and what lastgood makes of it."""

import errno
from collections.abc import Sequence
from typing import NamedTuple

from lastgood.testing.fault_file_ops import FaultFileOps, Stall

IMPATIENCE_SECS = 0.3
"""What a call may take where one never comes back."""

ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN")}
WORDS = {
    "EIO": ("I/O error",),
    "ENOSPC": ("no space is left", "not enough space"),
    "EDQUOT": ("quota",),
    "EINTR": ("Interrupted",),
    "EAGAIN": ("temporarily unavailable",),
}
"""How lastgood says it."""

CHANGES = (
    *("reserve", "truncate", "fsync_directory", "link", "replace", "rename_without_replacing"),
    *("unlink", "make_directory", "remove_directory"),
)
"""Operations whose answer may get lost on the way from a file server: done, and reported as failed."""

LOST_ANSWER = "EIO, though done"
SHORT = {"one byte": 1, "half": None}
NEVER_RETURNS = "never returns"
RETURNS_LATE = "returns when the next save is over"
NOTHING_WORKS = "EIO for ever"
NOTHING_RETURNS = "nothing ever returns"
STALLS = (NEVER_RETURNS, RETURNS_LATE, NOTHING_RETURNS)

CONTINUED = ("pwrite", "pread_into", "reserve")
"""What lastgood begins once more itself where a signal has interrupted it."""


class Fault(NamedTuple):
    """What happens to which call of an operation (``None``: of all); ``kind``: an errno's name, or one of the above."""

    kind: str
    operation: str | None
    call: int

    def plan(self, ops: FaultFileOps) -> Stall | None:
        if self.kind in STALLS:
            return ops.stall(self.operation, call=self.call, lasting=self.kind == NOTHING_RETURNS)
        if self.kind in SHORT:
            assert self.operation is not None
            ops.shorten(self.operation, call=self.call, longest=SHORT[self.kind])
        else:
            ops.fail(
                self.operation,
                ERRORS.get(self.kind, errno.EIO),
                call=self.call,
                lasting=self.kind == NOTHING_WORKS,
                is_done=self.kind == LOST_ANSWER,
            )
        return None

    @property
    def is_harmless(self) -> bool:
        """Nobody may notice."""
        return self.kind in SHORT or (self.kind == "EINTR" and self.operation in CONTINUED)

    @property
    def words(self) -> Sequence[str]:
        if self.kind in STALLS:
            return (f"{IMPATIENCE_SECS:g} s",)
        return WORDS.get(self.kind, WORDS["EIO"])
