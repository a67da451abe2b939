"""When a save is due: simulated trainings under a clock of their own, in which what saves cost is known exactly."""

import itertools
import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.errors import ConfigError
from lastgood.manager.schedule import EverySeconds, EverySteps, OverheadShare, Schedule

DAY = 86400.0


@dataclass
class Training:
    """Steps of ``step_secs``; a save stops them for ``stall_secs`` and takes ``durable_secs`` from its beginning.

    Steps may be longer or shorter than that, by the factor ``varies()``. While a save is under way, they take
    ``1 + slowdown`` times as long. ``saves`` holds the step of each save and when it began; ``useful_secs`` counts what
    the steps would have taken without any save.
    """

    schedule: Schedule
    step_secs: float = 0.5
    stall_secs: float = 0.02
    durable_secs: float = 2.0
    slowdown: float = 0.0
    varies: Callable[[], float] = lambda: 1.0
    fails: Callable[[int], bool] = lambda step: False
    now: float = 1000.0
    step: int = 0
    useful_secs: float = 0.0
    saves: list[tuple[int, float]] = field(default_factory=list)
    ends: list[tuple[float, bool]] = field(default_factory=list)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._train()
            due = self.schedule.is_due(self.step, self.now)
            self.schedule.looked(self.now, saving=due)
            if due:
                self.save()

    def save(self) -> None:
        self.saves.append((self.step, self.now))
        self.ends.append((self.now + self.durable_secs, self.fails(self.step)))
        self.now += self.stall_secs
        self.schedule.saved(self.step, self.now, self.stall_secs)
        self._end_saves()

    def _train(self) -> None:
        self.step += 1
        work_secs = self.step_secs * self.varies()
        under_way_secs = max((end - self.now for end, _ in self.ends), default=0.0)
        slowed_secs = min(work_secs, under_way_secs / (1 + self.slowdown))
        self.now += work_secs + self.slowdown * slowed_secs
        self.useful_secs += work_secs
        self._end_saves()

    def _end_saves(self) -> None:
        while self.ends and self.ends[0][0] <= self.now:
            end, failed = self.ends.pop(0)
            (self.schedule.failed if failed else self.schedule.durable)(end)

    @property
    def cost_secs(self) -> float:
        """What one save costs when steps are short against it."""
        return self.stall_secs + self.slowdown * (self.durable_secs - self.stall_secs) / (1 + self.slowdown)

    @property
    def saved_steps(self) -> list[int]:
        return [step for step, _ in self.saves]

    @property
    def gaps(self) -> list[float]:
        begins = [began for _, began in self.saves]
        return [after - before for before, after in itertools.pairwise(begins)]

    def overhead(self, steps: int) -> float:
        """The share of time that saves take in the next so many steps."""
        now, useful_secs = self.now, self.useful_secs
        self.run(steps)
        return 1 - (self.useful_secs - useful_secs) / (self.now - now)


def overhead_schedule(share: float = 0.01, mean_secs_between_failures: float = DAY) -> Schedule:
    return Schedule(overhead=share, mean_secs_between_failures=mean_secs_between_failures)


@given(steps=st.integers(1, 50), first=st.integers(0, 10**9), length=st.integers(0, 200))
def test_every_so_many_steps_means_exactly_these(steps: int, first: int, length: int) -> None:
    training = Training(Schedule(every_steps=steps), step=first)
    training.run(length)
    assert training.saved_steps == [step for step in range(first + 1, first + length + 1) if step % steps == 0]


def test_step_0_is_not_saved_for_its_number() -> None:
    assert not Schedule(every_steps=10).is_due(0, 0.0)
    assert not EverySteps(1).is_due(0)


def test_steps_are_saved_in_time_even_if_the_disk_is_slower_than_they_are() -> None:
    training = Training(Schedule(every_steps=5, overhead=0.5), durable_secs=60.0)
    training.run(1000)
    assert set(range(5, 1001, 5)) <= set(training.saved_steps)


@given(
    seconds=st.floats(0.1, 1000), step_secs=st.floats(0.05, 50), durable_secs=st.floats(0, 500), start=st.floats(0, 1e6)
)
def test_every_so_many_seconds_counts_from_the_beginning_of_the_save_before(
    seconds: float, step_secs: float, durable_secs: float, start: float
) -> None:
    training = Training(
        Schedule(every_secs=seconds), step_secs=step_secs, durable_secs=durable_secs, now=start, stall_secs=0.0
    )
    first_asked = start + step_secs
    training.run(300)
    rounding = 1e-6
    for gap in training.gaps:
        assert seconds - rounding <= gap < seconds + step_secs + rounding
    waited = training.now - (training.saves[-1][1] if training.saves else first_asked)
    assert waited < seconds + rounding
    if training.saves:
        assert training.saves[0][1] - first_asked >= seconds - rounding


def test_a_save_on_demand_starts_the_seconds_anew_from_its_beginning() -> None:
    training = Training(Schedule(every_secs=10), step_secs=1.0, stall_secs=2.5)
    training.run(5)
    training.save()
    training.run(7)
    assert training.saved_steps == [5]
    training.run(3)
    assert training.saved_steps[1:] == [13]


def test_one_step_is_never_due_twice() -> None:
    schedule = Schedule(every_steps=1, every_secs=0.001, overhead=0.5)
    assert schedule.is_due(7, 0.0)
    assert schedule.is_due(7, 0.0)  # asking changes nothing
    schedule.looked(0.0, saving=True)
    schedule.saved(7, 1.0, 1.0)
    schedule.failed(2.0)
    schedule.looked(5.0, saving=False)
    schedule.looked(6.0, saving=False)
    assert not schedule.is_due(7, 1e9)
    assert schedule.is_due(8, 1e9)


def test_whichever_part_asks_first_is_heard() -> None:
    schedule = Schedule(every_steps=100, every_secs=60)
    assert not schedule.is_due(1, 0.0)
    assert not schedule.is_due(2, 59.0)
    assert schedule.is_due(2, 60.0)
    assert schedule.is_due(100, 1.0)


def test_with_nothing_configured_nothing_is_due() -> None:
    training = Training(Schedule())
    training.run(1000)
    assert training.saves == []
    assert training.schedule.explain() == "Nothing says when to save."


def test_by_overhead_the_first_look_saves_so_that_the_cost_is_known() -> None:
    training = Training(overhead_schedule())
    assert training.schedule.cost_secs is None
    assert training.schedule.interval_secs is None
    assert "not known yet" in training.schedule.explain()
    training.run(20)
    assert training.saved_steps == [1]
    assert training.schedule.cost_secs == pytest.approx(0.02)


def test_a_training_that_saves_by_other_rules_alone_has_no_interval() -> None:
    training = Training(Schedule(every_steps=3))
    training.run(100)
    assert training.schedule.interval_secs is None
    assert training.schedule.explain() == "A save is due every 3 steps."


@given(
    share=st.sampled_from([0.001, 0.01, 0.05, 0.3]),
    mean_secs=st.sampled_from([600.0, 3600.0, DAY]),
    step_secs=st.floats(0.01, 300),
    stall_secs=st.floats(0, 20),
    durable_secs=st.floats(0, 200),
    slowdown=st.floats(0, 2),
)
def test_saves_take_no_larger_share_than_asked_for_and_none_comes_too_soon(
    share: float, mean_secs: float, step_secs: float, stall_secs: float, durable_secs: float, slowdown: float
) -> None:
    training = Training(
        overhead_schedule(share, mean_secs),
        step_secs=step_secs,
        stall_secs=stall_secs,
        durable_secs=stall_secs + durable_secs,
        slowdown=slowdown,
    )
    training.run(1000)
    training.saves.clear()
    spent = training.overhead(2000)
    # These steps may begin just before a save and end just after one, so they may hold one more than they should.
    cost = training.cost_secs
    assert spent <= share * 1.001 + cost / (2000 * step_secs)
    young = math.sqrt(2 * cost * mean_secs)
    for gap in training.gaps:
        assert gap >= young * 0.999
        assert gap >= training.durable_secs * 0.999
        assert gap >= cost / share * 0.999


def test_steps_of_uneven_length_do_not_hide_the_cost(rng_seed: int) -> None:
    vary = random.Random(rng_seed)
    training = Training(
        overhead_schedule(),
        stall_secs=0.2,
        durable_secs=5.0,
        slowdown=0.2,
        varies=lambda: vary.lognormvariate(0, 0.2) * (50 if vary.random() < 0.002 else 1),
    )
    training.run(5000)
    assert training.overhead(50_000) <= 0.011


@settings(max_examples=20)
@given(step_secs=st.floats(0.05, 2), stall_secs=st.floats(0.001, 1), slowdown=st.floats(0, 1))
def test_saves_come_no_later_than_the_bounds_ask_for(step_secs: float, stall_secs: float, slowdown: float) -> None:
    training = Training(overhead_schedule(), step_secs=step_secs, stall_secs=stall_secs, slowdown=slowdown)
    training.run(500)
    while len(training.saves) < 12:
        training.run(100)
    cost = training.cost_secs
    interval = max(cost / 0.01, cost + math.sqrt(2 * cost * DAY), training.durable_secs)
    for gap in training.gaps[6:]:
        assert gap <= 1.001 * interval + 2 * (1 + slowdown) * step_secs


def test_the_slowdown_in_the_background_is_part_of_the_cost() -> None:
    training = Training(overhead_schedule(), step_secs=0.5, stall_secs=0.1, durable_secs=10.1, slowdown=0.25)
    while len(training.saves) < 8:
        training.run(100)
    # Ten seconds after the stall, a quarter longer each: eight steps' worth is done in them, two are lost.
    assert training.schedule.cost_secs == pytest.approx(2.1, rel=0.05)


def test_a_step_longer_than_the_interval_still_leaves_steps_to_compare_with() -> None:
    training = Training(overhead_schedule(), step_secs=300.0, stall_secs=0.01, durable_secs=30.0, slowdown=0.5)
    training.run(100)
    assert training.schedule.cost_secs == pytest.approx(10.01, rel=0.05)
    assert training.overhead(400) <= 0.011


def test_a_slow_disk_is_given_one_save_at_a_time() -> None:
    training = Training(overhead_schedule(0.5, 1.0), step_secs=1.0, stall_secs=0.001, durable_secs=100.0)
    training.run(2000)
    assert min(training.gaps) >= 100.0
    assert len(training.saves) == pytest.approx(2000 / 102, abs=2)
    assert "until it was durable" in training.schedule.explain()


def test_the_interval_follows_a_cost_that_changes() -> None:
    training = Training(overhead_schedule(), stall_secs=0.01, durable_secs=1.0)
    while len(training.saves) < 10:
        training.run(100)
    cheap = training.schedule.interval_secs
    assert cheap == pytest.approx(0.01 + math.sqrt(2 * 0.01 * DAY), rel=0.01)

    training.stall_secs = 60.0
    while len(training.saves) < 20:
        training.run(1000)
    assert training.schedule.interval_secs == pytest.approx(6000, rel=0.01)
    assert "more than 1 % of the time" in training.schedule.explain()

    training.stall_secs = 0.01
    while len(training.saves) < 30:
        training.run(1000)
    assert training.schedule.interval_secs == pytest.approx(cheap, rel=0.01)
    assert "the work that it rescues" in training.schedule.explain()


def test_steps_that_change_their_length_do_not_look_like_a_cost_for_long() -> None:
    training = Training(overhead_schedule(), step_secs=0.2, stall_secs=0.1)
    training.run(5000)
    training.step_secs = 0.6
    training.run(2500)
    assert training.schedule.cost_secs == pytest.approx(0.1)


def test_a_pause_of_the_training_during_one_save_is_not_taken_for_the_rule() -> None:
    training = Training(overhead_schedule(), stall_secs=0.1)
    while len(training.saves) < 6:
        training.run(1)
    training.now += 3600  # an evaluation, in the middle of the sixth save
    training.run(1000)
    assert training.schedule.cost_secs == pytest.approx(0.1)


def test_a_pause_between_saves_does_not_hide_what_they_cost() -> None:
    training = Training(overhead_schedule(), step_secs=1.0, stall_secs=0.1, durable_secs=30.1, slowdown=0.5)
    training.run(50)
    training.now += 3600
    while len(training.saves) < 8:
        training.run(100)
        training.now += 3600
    assert training.schedule.cost_secs == pytest.approx(10.1)


def test_a_save_costs_its_stall_even_if_the_steps_beside_it_were_short() -> None:
    schedule = overhead_schedule()
    for now in (0.0, 10.0, 20.0):
        schedule.looked(now, saving=now == 20.0)
    schedule.saved(1, 21.0, 1.0)
    schedule.durable(21.5)
    schedule.looked(22.0, saving=False)
    assert schedule.cost_secs == 1.0


def test_a_save_on_demand_delays_the_step_in_which_it_is_made() -> None:
    schedule = overhead_schedule()
    for now in (0.0, 10.0, 20.0, 30.0):
        schedule.looked(now, saving=False)
    schedule.saved(3, 36.0, 1.0)
    schedule.durable(38.0)
    schedule.looked(43.0, saving=False)
    assert schedule.cost_secs == 3.0


def test_failed_saves_never_make_saving_look_cheap() -> None:
    training = Training(overhead_schedule(), stall_secs=5.0, durable_secs=5.0)
    while len(training.saves) < 6:
        training.run(100)
    interval = training.schedule.interval_secs
    training.stall_secs, training.fails = 0.001, lambda step: True
    while len(training.saves) < 16:
        training.run(100)
    assert training.schedule.interval_secs == interval


def test_costly_failures_count_from_the_first() -> None:
    training = Training(overhead_schedule(), stall_secs=5.0, durable_secs=5.0, fails=lambda step: True)
    training.run(3000)
    assert training.schedule.cost_secs == pytest.approx(5.0)
    assert min(training.gaps) >= 500


def test_a_save_that_raised_does_not_stay_under_way_for_ever() -> None:
    """As after an interrupt in the middle of ``save``: neither ``saved`` nor ``failed`` was called."""
    training = Training(overhead_schedule(), stall_secs=1.0)
    while len(training.saves) < 3:
        training.run(10)
    training.schedule.looked(training.now, saving=True)
    before = len(training.saves)
    training.run(2000)
    assert len(training.saves) > before


def test_an_announced_save_that_is_not_made_leaves_the_one_under_way() -> None:
    schedule = Schedule(every_steps=1, overhead=0.5, mean_secs_between_failures=1e-9)
    schedule.looked(0.0, saving=True)
    schedule.saved(1, 1.0, 1.0)
    schedule.looked(50.0, saving=True)
    schedule.looked(51.0, saving=False)
    schedule.durable(100.0)
    schedule.looked(101.0, saving=False)
    assert schedule.cost_secs == 1.0  # and that is of one save
    assert schedule.interval_secs == 100.0


def test_announcements_alone_cost_nothing() -> None:
    schedule = Schedule(every_steps=1, overhead=0.5)
    for step in range(100):
        schedule.looked(float(step), saving=step > 10)
    assert schedule.cost_secs is None


def test_a_failure_of_one_under_way_leaves_the_announced_one() -> None:
    schedule = Schedule(every_steps=1, overhead=0.5)
    schedule.looked(0.0, saving=True)
    schedule.saved(1, 1.0, 1.0)
    schedule.looked(2.0, saving=True)
    schedule.failed(2.5)  # the first one, reported in the middle of the second save
    schedule.saved(2, 3.0, 1.0)
    schedule.looked(4.0, saving=False)
    assert schedule.cost_secs is None  # the second is under way still
    schedule.durable(4.5)
    schedule.looked(5.0, saving=False)
    assert schedule.cost_secs == 1.0  # two stalls of a second, and no step without a save to compare with


def test_an_announced_save_that_fails_at_once_is_over() -> None:
    schedule = overhead_schedule()
    assert schedule.is_due(1, 0.0)
    schedule.looked(0.0, saving=True)
    schedule.failed(0.1)
    schedule.looked(1.0, saving=False)
    assert schedule.cost_secs is None  # a failure that cost nothing tells nothing
    assert schedule.is_due(2, 2.0)


def test_ends_that_nothing_had_begun_change_nothing() -> None:
    schedule = overhead_schedule()
    schedule.durable(1.0)
    schedule.failed(1.0)
    assert schedule.is_due(1, 2.0)
    assert schedule.cost_secs is None


def test_saves_on_demand_alone_are_measured_once_somebody_looks() -> None:
    schedule = overhead_schedule()
    schedule.saved(1, 12.0, 2.0)
    schedule.durable(13.0)
    schedule.looked(14.0, saving=False)
    schedule.looked(15.0, saving=False)
    assert schedule.cost_secs == 2.0


def test_saves_that_end_in_other_threads_are_all_counted() -> None:
    """Each save ends while the training looks, from a thread of its own: none is lost, and none stays under way."""
    schedule = Schedule(every_steps=1, overhead=0.5)
    rounds = 300
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def end_saves() -> None:
        try:
            for number in range(rounds):
                barrier.wait(30)
                (schedule.failed if number % 3 == 0 else schedule.durable)(number + 0.5)
                barrier.wait(30)
        except BaseException as error:
            errors.append(error)

    ender = threading.Thread(target=end_saves)
    ender.start()
    for number in range(rounds):
        schedule.looked(float(number), saving=True)
        schedule.saved(number, number + 0.25, 0.25)
        barrier.wait(30)
        for _ in range(20):
            schedule.is_due(number + 1, number + 0.5)
            schedule.explain()
        barrier.wait(30)
    ender.join(30)
    assert not ender.is_alive()
    assert errors == []
    schedule.looked(float(rounds), saving=False)
    assert schedule.cost_secs == 0.25  # with no step without a save, the stall; a save still under way would show here
    schedule.looked(rounds + 1.0, saving=False)
    assert schedule.is_due(rounds + 1, rounds + 1.0)


@given(st.data())
def test_no_order_of_calls_breaks_it(data: st.DataObject) -> None:
    """Whatever happens, a training that goes on saves again, and saves whose cost is known keep their distance."""
    schedule = overhead_schedule(0.1, 100.0)
    now, step = 0.0, 0
    for call in data.draw(st.lists(st.sampled_from(["look", "save", "saved", "durable", "failed"]), max_size=60)):
        now += data.draw(st.floats(0, 10))
        step += 1
        match call:
            case "look":
                schedule.looked(now, saving=False)
            case "save":
                schedule.looked(now, saving=schedule.is_due(step, now))
            case "saved":
                schedule.saved(step, now, data.draw(st.floats(0, 5)))
            case "durable":
                schedule.durable(now)
            case "failed":
                schedule.failed(now)
        assert schedule.cost_secs is None or schedule.cost_secs >= 0
    for _ in range(60):  # whatever is under way ends
        schedule.durable(now)
    training = Training(schedule, now=now, step=step)
    training.run(2000)
    assert len(training.saves) > 1
    assert min(training.gaps[10:], default=math.inf) >= math.sqrt(2 * training.stall_secs * 100)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan, math.inf, "0.01", None, True])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="overhead"):
        OverheadShare(share)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1, 1.5, math.nan, "10", None, True])
def test_steps_that_are_none_are_refused(steps: object) -> None:
    with pytest.raises(ConfigError, match="steps"):
        EverySteps(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "10", None, True])
def test_seconds_that_are_none_are_refused(seconds: object) -> None:
    with pytest.raises(ConfigError, match="seconds"):
        EverySeconds(seconds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="between failures"):
        OverheadShare(0.01, seconds)  # type: ignore[arg-type]


def test_the_schedule_refuses_what_its_parts_refuse() -> None:
    with pytest.raises(ConfigError):
        Schedule(every_steps=0)
    with pytest.raises(ConfigError):
        Schedule(every_secs=0)
    with pytest.raises(ConfigError):
        Schedule(overhead=1)
    with pytest.raises(ConfigError):
        Schedule(overhead=0.01, mean_secs_between_failures=0)


def test_the_explanation_names_everything_that_is_configured() -> None:
    training = Training(Schedule(every_steps=1, every_secs=90, overhead=0.02), stall_secs=2.0)
    assert training.schedule.explain() == (
        "A save is due at every step, or every 90 s, or as often as takes 2 % of the time. What a save costs is not "
        "known yet: the first one shows it."
    )
    training.run(100)
    assert training.schedule.explain() == (
        "A save is due at every step, or every 90 s, or as often as takes 2 % of the time. That is every 590 s for "
        "now: a save costs 2 s, and more often would cost more than the work that it rescues."
    )
