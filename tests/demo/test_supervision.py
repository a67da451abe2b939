"""Kills fall where they were planned; a child that dies of something else is reported; no child is left behind."""

import os
import signal
import time
from pathlib import Path

import pytest
from tests.demo.runs import tiny_settings

from lastgood.cli._demo.figures import figures_of, repeated_steps
from lastgood.cli._demo.kills import Executioner, Kill, plan_kills
from lastgood.cli._demo.process import TrainingFailedError
from lastgood.cli._demo.protocol import Event, Resumed, SaveBegins, SaveDone, StepDone, decode, encode
from lastgood.cli._demo.supervisor import Killed, Life, run_to_the_end


def _children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_plan_is_repeated_by_its_seed_and_spreads_its_kills(rng_seed: int) -> None:
    plan = plan_kills(6, steps=120, seed=rng_seed)
    assert plan == plan_kills(6, steps=120, seed=rng_seed)
    assert plan != plan_kills(6, steps=120, seed=rng_seed + 1)
    assert [kill.in_save for kill in plan] == [True, False] * 3
    assert all(1 + index * 119 // 6 <= kill.step <= (index + 1) * 119 // 6 for index, kill in enumerate(plan))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_plan_fits_into_a_run_shorter_than_itself(count: int, rng_seed: int) -> None:
    plan = plan_kills(count, steps=3, seed=rng_seed)
    assert len(plan) == count
    assert all(1 <= kill.step <= 3 for kill in plan)


def test_a_kill_in_a_save_is_aimed_at_a_save_and_again_if_that_was_too_quick() -> None:
    executioner = Executioner([Kill(step=3, in_save=True, fraction=0.5)])
    executioner.watch(SaveBegins(2))
    assert executioner.moment is None
    executioner.watch(SaveDone(2, seconds=60.0, nbytes=1))
    executioner.watch(StepDone(4, loss=1.0, seconds=0.1))
    assert executioner.moment is None
    delays = []
    for step in (4, 6):
        executioner.watch(SaveBegins(step))
        assert executioner.moment is not None
        delays.append(executioner.moment - time.monotonic())
        executioner.watch(SaveDone(step, seconds=60.0, nbytes=1))
        assert executioner.moment is None
    assert 0 < delays[1] < delays[0] < 60.0

    executioner.watch(SaveBegins(8))
    executioner.struck(in_save=False)  # The signal came after the save: this kill is still to be done.
    executioner.watch(SaveBegins(8))
    assert executioner.moment is not None
    executioner.struck(in_save=True)
    executioner.watch(SaveBegins(10))
    assert executioner.moment is None


def test_a_kill_in_a_step_is_aimed_once_whatever_happens_meanwhile() -> None:
    executioner = Executioner([Kill(step=3, in_save=False, fraction=0.5)])
    executioner.watch(StepDone(2, loss=1.0, seconds=60.0))
    assert executioner.moment is None
    executioner.watch(StepDone(3, loss=1.0, seconds=60.0))
    moment = executioner.moment
    assert moment is not None
    executioner.watch(SaveBegins(3))
    executioner.watch(SaveDone(3, seconds=0.1, nbytes=1))
    executioner.watch(StepDone(4, loss=1.0, seconds=60.0))
    assert executioner.moment == moment


def test_figures_count_kills_repetitions_and_stalls() -> None:
    def steps(first: int, last: int) -> list[Event]:
        return [StepDone(step, loss=1.0, seconds=0.5) for step in range(first, last + 1)]

    lives = [
        Life(
            [Resumed(0, 0.0), *steps(1, 5), SaveBegins(5), SaveDone(5, 0.2, 1000), *steps(6, 8)], 3.0, Killed(8, False)
        ),
        Life([Resumed(5, 0.1), *steps(6, 10), SaveBegins(10)], 4.0, Killed(10, True)),
        Life([Resumed(5, 0.3, ("damaged",)), *steps(6, 10), SaveBegins(10), SaveDone(10, 0.4, 2000)], 6.0),
    ]
    assert repeated_steps(lives) == [3, 5]
    figures = figures_of(lives)
    assert (figures.kills, figures.kills_in_save, figures.steps, figures.steps_repeated) == (2, 1, 10, 8)
    assert (figures.checkpoints, figures.checkpoint_bytes, figures.passed_over) == (2, 2000, 1)
    assert figures.stall_median_seconds == pytest.approx(0.3)
    assert figures.stall_max_seconds == 0.4
    assert figures.stall_share == pytest.approx(0.6 / (0.6 + 18 * 0.5))
    assert figures.load_median_seconds == pytest.approx(0.2)
    assert figures.restart_median_seconds == 5.0
    assert figures_of([Life()]).stall_share == 0.0


def test_events_travel_as_lines() -> None:
    for event in (Resumed(3, 0.25, ("step-4 is damaged:\nbyte 3",)), StepDone(4, 0.1 + 0.2, 1e-9)):
        line = encode(event)
        assert line.count(b"\n") == 1
        assert decode(line) == event


def test_a_child_that_fails_is_shown_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log = tmp_path / "training.log"
    log.write_text("from an earlier life\n")
    with pytest.raises(TrainingFailedError, match="exit status 1") as caught:
        run_to_the_end(tiny_settings(tmp_path / "file" / "below"), [], log, lambda event: None)
    assert "Traceback (most recent call last)" in str(caught.value)
    assert "lastgood.errors." in str(caught.value)
    assert "from an earlier life" not in str(caught.value)
    assert "from an earlier life" in log.read_text()


def test_a_signal_that_the_demo_did_not_send_is_not_taken_for_a_planned_kill(tmp_path: Path) -> None:
    before = _children()

    def kill_it(event: Event | Killed) -> None:
        if isinstance(event, StepDone):
            (child,) = _children() - before
            os.kill(child, signal.SIGKILL)

    kills = [Kill(step=10**6, in_save=False, fraction=0.5)]
    with pytest.raises(TrainingFailedError, match=r"signal 9 .*the demo did not send"):
        run_to_the_end(tiny_settings(tmp_path, steps=100_000), kills, tmp_path / "log", kill_it)


def test_ctrl_c_leaves_no_child_behind(tmp_path: Path) -> None:
    before = _children()
    pids = []

    def press_ctrl_c(event: Event | Killed) -> None:
        pids.extend(_children() - before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_the_end(tiny_settings(tmp_path, steps=100_000), [], tmp_path / "log", press_ctrl_c)
    assert len(pids) == 1
    assert not _is_running(pids[0])
