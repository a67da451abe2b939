"""What all ranks decide together: one answer for all, asked for by all at the same place of the training loop."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed

from lastgood.errors import ConfigError, LastgoodError
from lastgood.types import RankInfo

Answer = TypeVar("Answer")

_TIMEOUT = timedelta(minutes=30)


class Ranks(Protocol):
    """The ranks of one training. With several, every method has to be called by all of them, in the same order."""

    info: RankInfo

    def gather(self, answer: Answer) -> list[Answer]:
        """The answers of all, by rank."""

    def from_first(self, ask: Callable[[], Answer]) -> Answer:
        """What ``ask`` returns on rank 0; what it raises there, all raise."""

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether one of the ranks has it raised."""


class OneRank:
    """A training without others."""

    def __init__(self) -> None:
        self.info = RankInfo(0, 1)

    def gather(self, answer: Answer) -> list[Answer]:
        return [answer]

    def from_first(self, ask: Callable[[], Answer]) -> Answer:
        return ask()

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        return flags


class ManyRanks:
    """The ranks of the default process group, which meet in a group of their own (gloo: it needs no device).

    They meet in the foreground only, when the training loop calls.
    """

    def __init__(self) -> None:
        self.info = RankInfo(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._group = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)

    def gather(self, answer: Answer) -> list[Answer]:
        answers: list[Any] = [None] * self.info.global_world_size
        torch.distributed.all_gather_object(answers, answer, group=self._group)
        return answers

    def from_first(self, ask: Callable[[], Answer]) -> Answer:
        error: Exception | None = None
        outcome: list[Any] = [None, None]
        if self.info.global_rank == 0:
            try:
                outcome[0] = ask()
            except Exception as raised:
                error = raised
                outcome[1] = f"{type(raised).__name__}: {raised}"
        torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise LastgoodError(f"rank 0 failed: {outcome[1]}", rank=0)
        return outcome[0]  # type: ignore[no-any-return]

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        votes = torch.tensor([int(flag) for flag in flags])
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return tuple(bool(vote) for vote in votes.tolist())


def find_ranks() -> Ranks:
    """Those of the default process group, if there is one; otherwise this process alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return OneRank()
    if not distributed.is_gloo_available():
        raise ConfigError("several ranks agree over gloo, and this torch was built without it")
    return ManyRanks()
