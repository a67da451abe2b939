"""When to save: every so many steps, every so many seconds, or as often as a share of the training time pays for.

No clock is read here: whoever asks says what time it is, in seconds of a clock that never goes back.
"""

import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

from lastgood.errors import ConfigError

COSTS_KEPT = 5
FREE_INTERVALS_KEPT = 100


@dataclass(frozen=True)
class EverySteps:
    """Save at each step that is a multiple of ``steps``, 0 excepted."""

    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConfigError(f"Saving every so many steps takes a whole number from 1 upwards, not {self.steps!r}.")

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.steps == 0

    def __str__(self) -> str:
        return "at every step" if self.steps == 1 else f"every {self.steps} steps"


@dataclass(frozen=True)
class EverySeconds:
    """Save once ``seconds`` have passed since the last save began, or since the question was first asked."""

    seconds: float

    def __post_init__(self) -> None:
        _require_positive(self.seconds, "Saving every so many seconds")

    def is_due(self, seconds_since_last: float) -> bool:
        return seconds_since_last >= self.seconds

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


@dataclass(frozen=True)
class OverheadShare:
    """Save as often as costs no more than ``share`` of the time, and no more often than is useful.

    With C the seconds by which one save delays the training, and M the mean seconds between failures, a save begins
    no sooner after the one before than each of these:

    - ``C / share``: the training in between takes ``C * (1 - share) / share``, so that C is that share of both.
    - ``C + sqrt(2 * C * M)``: with training of ``sqrt(2 * C * M)`` in between, the time for saves and the work that
      failures destroy (half of what is in between, on average) are least together. Saving more often would cost more
      than it rescues. J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications
      of the ACM 17(9), 1974. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart
      dumps", Future Generation Computer Systems 22(3), 2006, adds terms that matter where C is not small against M;
      there the first bound is the larger one by far.
    - what the last save took until it was durable: one at a time.
    """

    share: float = 0.01
    mean_secs_between_failures: float = 86400.0

    def __post_init__(self) -> None:
        _require_positive(self.share, "A share of overhead")
        if self.share >= 1:
            raise ConfigError(f"A share of overhead lies between 0 and 1 (0.01 is one per cent), not {self.share!r}.")
        _require_positive(self.mean_secs_between_failures, "The mean time between failures, in seconds,")

    def interval(self, cost_secs: float, durable_secs: float) -> tuple[float, str]:
        """The seconds from the beginning of one save to that of the next, and which of the three bounds that is."""
        young = math.sqrt(2 * cost_secs * self.mean_secs_between_failures)
        return max(
            (cost_secs / self.share, f"more often would cost more than {100 * self.share:g} % of the time"),
            (cost_secs + young, "more often would cost more than the work that it rescues"),
            (durable_secs, "that is what the last save took until it was durable"),
        )

    def __str__(self) -> str:
        return f"as often as takes {100 * self.share:g} % of the time"


@dataclass
class _Delay:
    """The intervals between looks from the beginning of a save until the first look after none is under way."""

    began: float
    under_way: deque[float] = field(default_factory=deque)  # when each began
    intervals: int = 0
    saves: int = 0
    stall_secs: float = 0.0
    failed: bool = False


class Schedule:
    """Says when a save is due, and measures what saves cost.

    A save is due when any of what is configured says so, and never a second time for the step that was saved last.
    With nothing configured none ever is. :class:`EverySteps`, :class:`EverySeconds` and :class:`OverheadShare` say
    what the arguments mean; nonsense among them raises :class:`ConfigError`.

    Tell it of each look (one after every training step), and of each save twice and in this order: by :meth:`saved`
    when the training goes on, by :meth:`durable` or :meth:`failed` when the save has ended. A save that a look
    announced and that never came to :meth:`saved` (it raised, or was not made after all) needs neither: the next look
    takes it back. The methods may be called from any thread.

    **The cost of a save** is the time from the look that began it to the first look that finds it ended, less what as
    many intervals between looks take by the median of the last 100 without a save under way. So it counts what slows
    the training in the background, too. It is the stall (the time in ``save``) at least, and just the stall as long as
    no interval without a save is known. Whatever else takes time during a save, such as an evaluation, counts as its
    cost; that is why the median of the last five costs is what intervals are computed from. A failed save never lowers
    it. Saves that overlap share what they cost together.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_secs: float | None = None,
        overhead: float | None = None,
        mean_secs_between_failures: float = 86400.0,
    ) -> None:
        self._every_steps = None if every_steps is None else EverySteps(every_steps)
        self._every_secs = None if every_secs is None else EverySeconds(every_secs)
        self._overhead = None if overhead is None else OverheadShare(overhead, mean_secs_between_failures)
        self._lock = threading.Lock()
        self._last_look: float | None = None
        self._last_step: int | None = None
        self._last_began: float | None = None  # before the first save: when this was first asked
        self._announced = False  # a look said that it saves now, and the save has not let the training go on yet
        self._delay: _Delay | None = None
        self._durable_secs = 0.0
        self._free_intervals: deque[float] = deque(maxlen=FREE_INTERVALS_KEPT)
        self._costs: deque[float] = deque(maxlen=COSTS_KEPT)

    def is_due(self, step: int, now: float) -> bool:
        """Whether ``step`` should be saved. It may be asked again: only the first question ever starts a clock."""
        with self._lock:
            if self._last_began is None:
                self._last_began = now
            if step == self._last_step:
                return False
            since = now - self._last_began
            return (
                (self._every_steps is not None and self._every_steps.is_due(step))
                or (self._every_secs is not None and self._every_secs.is_due(since))
                or self._is_worth_its_cost(since)
            )

    def _is_worth_its_cost(self, since: float) -> bool:
        if self._overhead is None or self._delay is not None:
            # While a delay is being measured none is due. As it ends with a look, which comes after the question, at
            # least one interval after every save has none: what a step takes by itself stays known.
            return False
        interval = self._interval()
        return interval is None or since >= interval[0]

    def looked(self, now: float, *, saving: bool) -> None:
        """A training step is over, and a save is made now if ``saving`` says so."""
        with self._lock:
            if self._announced and self._delay is not None and self._delay.under_way:
                self._delay.under_way.pop()
                self._delay.saves -= 1
            if self._last_look is not None:
                self._note_interval(now, now - self._last_look)
            self._last_look = now
            self._announced = saving
            if saving:
                self._begin(now)

    def saved(self, step: int, now: float, stall_secs: float) -> None:
        """The save of ``step`` has let the training go on, after ``stall_secs``. It need not have been announced."""
        with self._lock:
            if not self._announced:
                self._begin(now - stall_secs)
            self._announced = False
            self._last_step = step
            if self._delay is not None:
                self._delay.stall_secs += stall_secs

    def durable(self, now: float) -> None:
        """The oldest save under way can no longer be lost."""
        with self._lock:
            if self._delay is not None and self._delay.under_way:
                self._durable_secs = now - self._delay.under_way.popleft()

    def failed(self, now: float) -> None:
        """The oldest save under way has come to nothing. That makes the next one due no sooner."""
        with self._lock:
            if self._delay is not None and self._delay.under_way:
                self._delay.under_way.popleft()
                self._delay.failed = True

    @property
    def cost_secs(self) -> float | None:
        """The seconds by which a save delays the training; ``None`` before the first has been measured."""
        with self._lock:
            return self._cost()

    @property
    def interval_secs(self) -> float | None:
        """The seconds from save to save by their cost; ``None`` if that was not asked for or is not known yet."""
        with self._lock:
            interval = self._interval()
            return None if interval is None else interval[0]

    def explain(self) -> str:
        """In words: what is configured, and what the measured cost makes of it."""
        with self._lock:
            parts = [str(part) for part in (self._every_steps, self._every_secs, self._overhead) if part is not None]
            if not parts:
                return "Nothing says when to save."
            text = f"A save is due {', or '.join(parts)}."
            interval, cost = self._interval(), self._cost()
            if interval is not None and cost is not None:
                text += f" That is every {_rounded(interval[0])} s for now: "
                text += f"a save costs {_rounded(cost)} s, and {interval[1]}."
            elif self._overhead is not None:
                text += " What a save costs is not known yet: the first one shows it."
            return text

    def _interval(self) -> tuple[float, str] | None:
        cost = self._cost()
        return None if cost is None or self._overhead is None else self._overhead.interval(cost, self._durable_secs)

    def _cost(self) -> float | None:
        # Of two, the higher one: the first of all is the stall alone, and tells little.
        return statistics.median_high(self._costs) if self._costs else None

    def _begin(self, now: float) -> None:
        self._last_began = now
        if self._delay is None:
            # A save that no look announced began in the middle of an interval, which counts from its beginning.
            self._delay = _Delay(began=now if self._last_look is None else self._last_look)
        self._delay.under_way.append(now)
        self._delay.saves += 1

    def _note_interval(self, now: float, seconds: float) -> None:
        delay = self._delay
        if delay is None:
            self._free_intervals.append(seconds)
            return
        delay.intervals += 1
        if delay.under_way:
            return
        self._delay = None
        if not delay.saves:
            return
        cost = delay.stall_secs
        if self._free_intervals:
            cost = max(cost, now - delay.began - delay.intervals * statistics.median(self._free_intervals))
        cost /= delay.saves
        if not delay.failed or cost > (self._cost() or 0.0):
            self._costs.append(cost)


def _rounded(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def _require_positive(value: object, what: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{what} takes a number above 0, not {value!r}.")
