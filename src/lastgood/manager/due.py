"""Whether to save now: one decision for all ranks, from the schedule and from notices of preemption."""

import time

from lastgood._events import logger
from lastgood.manager.preemption import PreemptionNotice
from lastgood.manager.ranks import Ranks
from lastgood.manager.schedule import Schedule


class DueDecision:
    """Asked once after each step, by all ranks at the same one."""

    def __init__(self, schedule: Schedule, notice: PreemptionNotice, ranks: Ranks) -> None:
        self._schedule = schedule
        self._notice = notice
        self._ranks = ranks
        self._answer: tuple[int, bool] | None = None
        self._has_agreed_on_preemption = False

    def is_due(self, step: int) -> bool:
        """Whether the state of ``step`` should be saved; asked again for the same step, the same answer."""
        if self._answer is not None and self._answer[0] == step:
            return self._answer[1]
        now = time.monotonic()
        # Clocks differ: the first rank's counts. Any rank's notice does.
        is_first = self._ranks.info.global_rank == 0
        due, preempted = self._ranks.any_of(
            is_first and self._schedule.is_due(step, now), self._notice.came_at is not None
        )
        if preempted and not self._has_agreed_on_preemption:
            self._has_agreed_on_preemption = due = True
            logger.warning("this run is being preempted: it saves now, and should end")
        self._schedule.looked(now, saving=due)
        self._answer = (step, due)
        return due

    @property
    def is_preempted(self) -> bool:
        """Whether the run is to end; with several ranks, since they last met."""
        if self._ranks.info.global_world_size == 1:
            return self._notice.came_at is not None
        return self._has_agreed_on_preemption

    def forget(self) -> None:
        """The run stands at another step now."""
        self._answer = None
