"""What all ranks decide together: one answer for all, asked for by all at the same place of the training loop."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed

from lastgood._coordination.address import from_first
from lastgood.errors import BarrierTimeoutError, ConfigError, LastgoodError
from lastgood.types import RankInfo

Answer = TypeVar("Answer")


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

    def __init__(self, timeout_secs: float) -> None:
        self.info = RankInfo(torch.distributed.get_rank(), torch.distributed.get_world_size())
        self._timeout_secs = timeout_secs
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_secs))

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except LastgoodError:
            raise
        except RuntimeError as error:
            raise BarrierTimeoutError(
                f"rank {self.info.global_rank} could not meet the other ranks to decide what to do about checkpoints "
                f"(within {self._timeout_secs:g} s, or one of them has ended). Did all ranks make the same calls of "
                f"their managers, at the same steps? Checkpoints are untouched. ({error})",
                rank=self.info.global_rank,
                phase="agree",
            ) from error

    def gather(self, answer: Answer) -> list[Answer]:
        answers: list[Any] = [None] * self.info.global_world_size
        with self._meeting():
            torch.distributed.all_gather_object(answers, answer, group=self._group)
        return answers

    def from_first(self, ask: Callable[[], Answer]) -> Answer:
        with self._meeting():
            return from_first(ask, self.info.global_rank, self._group)

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        votes = torch.tensor([int(flag) for flag in flags])
        with self._meeting():
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return tuple(bool(vote) for vote in votes.tolist())


def find_ranks(rank_info: RankInfo | None, timeout_secs: float) -> Ranks:
    """Those of the default process group, if there is one; otherwise, or if ``rank_info`` says so, this one alone.

    ``timeout_secs`` is how long they wait for each other.
    """
    distributed = torch.distributed
    if rank_info is not None and rank_info.global_world_size == 1:
        return OneRank()
    if not (distributed.is_available() and distributed.is_initialized()):
        launched = os.environ.get("WORLD_SIZE", "1")
        if rank_info is not None or launched not in ("", "0", "1"):
            raise ConfigError(
                f"this process is one of several ({rank_info or f'WORLD_SIZE={launched}'}), and there is no process "
                "group in which they could agree: all would save to the same place. Call "
                "torch.distributed.init_process_group before you make the manager; or pass rank_info=RankInfo(0, 1) "
                "where only this one saves."
            )
        return OneRank()
    found = RankInfo(distributed.get_rank(), distributed.get_world_size())
    if rank_info not in (None, found):
        raise ConfigError(f"rank_info is {rank_info}, but the default process group says {found}")
    if found.global_world_size == 1:
        return OneRank()
    if not distributed.is_gloo_available():
        raise ConfigError("several ranks agree over gloo, and this torch was built without it")
    return ManyRanks(timeout_secs)
