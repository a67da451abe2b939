"""How ranks wait for what others put into the store: on a clock of the test's own."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood._coordination import meeting
from lastgood._coordination.meeting import pause_after, wait_for


class Clock:
    """Time that passes only while somebody sleeps or looks."""

    def __init__(self, secs_a_look: float = 0.0) -> None:
        self.now = 0.0
        self.looks: list[float] = []
        self._secs_a_look = secs_a_look

    def monotonic(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        assert secs >= 0
        self.now += secs

    def look_until(self, when: float) -> Callable[[float], bool]:
        def look(left_secs: float) -> bool:
            assert left_secs >= 0
            self.looks.append(self.now)
            self.now += self._secs_a_look
            return self.looks[-1] >= when

        return look


def wait_on(clock: Clock, when: float, timeout_secs: float, world_size: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "time", clock)
        return wait_for(clock.look_until(when), timeout_secs, world_size)


@given(
    when=st.floats(0, 100),
    timeout_secs=st.floats(0.001, 100),
    world_size=st.integers(1, 20_000),
    secs_a_look=st.sampled_from([0.0, 0.0001, 0.3]),
)
def test_what_comes_in_time_is_found_and_nobody_waits_longer_than_told(
    when: float, timeout_secs: float, world_size: int, secs_a_look: float
) -> None:
    clock = Clock(secs_a_look)
    came = wait_on(clock, when, timeout_secs, world_size)
    if when <= timeout_secs:
        assert came
        # As late as an eighth of the time waited, or a share of what all ranks may ask.
        longest = max(0.05, world_size / 5000)
        assert clock.looks[-1] <= when + min(longest, max(when / 8, 0.001, world_size / 5000)) + secs_a_look + 1e-9
    else:
        assert not came or clock.looks[-1] <= timeout_secs + secs_a_look + 1e-9
    if not came:
        assert timeout_secs <= clock.now <= timeout_secs + 2 * secs_a_look + 1e-9
        assert clock.looks[-1] >= timeout_secs - 1e-9  # it looked once more at the end


@pytest.mark.parametrize("world_size", [2, 250, 1024, 16_384])
def test_all_ranks_together_ask_a_bounded_number_of_times(world_size: int) -> None:
    clock = Clock()
    assert not wait_on(clock, 1000, 60, world_size)
    assert (len(clock.looks) - 2) * world_size <= 60 * 5000
    assert len(clock.looks) <= 60 * 20 + 100


def test_a_rank_of_a_small_job_looks_soon_and_then_less_often() -> None:
    assert pause_after(0, 2) == 0.001
    assert pause_after(0.1, 2) == pytest.approx(0.0125)
    assert pause_after(50, 2) == 0.05
    assert pause_after(0, 16_384) == pause_after(50, 16_384) == pytest.approx(3.2768)
