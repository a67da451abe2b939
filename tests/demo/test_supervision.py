"""Kills fall where they were planned; a child that dies of something else is reported; no child is left behind."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.demo.runs import has_ended, tiny_settings
from tests.helpers.workers import PATIENCE_SECS

from lastgood.cli._demo.figures import Spread, figures_of, repeated_steps
from lastgood.cli._demo.kills import Executioner, Kill, plan_kills
from lastgood.cli._demo.process import TrainingFailedError
from lastgood.cli._demo.protocol import (
    Event,
    Resumed,
    SaveBegins,
    SaveDone,
    SaveReturned,
    Staged,
    StepDone,
    decode,
    encode,
)
from lastgood.cli._demo.supervisor import Killed, Landed, Life, run_to_the_end, what_became_of
from lastgood.cli._demo.survivor import Survivor


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_plan_is_repeated_by_its_seed_and_spreads_its_kills(rng_seed: int) -> None:
    plan = plan_kills(6, steps=120, seed=rng_seed)
    assert plan == plan_kills(6, steps=120, seed=rng_seed)
    assert plan != plan_kills(6, steps=120, seed=rng_seed + 1)
    moments = [kill.moment for kill in plan]
    assert moments == ["in a save", "staged", "in a save", "in a step", "in a save", "staged"]
    assert all(1 + index * 119 // 6 <= kill.step <= (index + 1) * 119 // 6 for index, kill in enumerate(plan))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_plan_fits_into_a_run_shorter_than_itself(count: int, rng_seed: int) -> None:
    plan = plan_kills(count, steps=3, seed=rng_seed)
    assert len(plan) == count
    assert all(1 <= kill.step <= 3 for kill in plan)


def test_a_kill_in_a_save_is_aimed_at_a_save_and_again_if_that_was_too_quick() -> None:
    executioner = Executioner([Kill(3, "in a save", fraction=0.5)])
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
    executioner.struck("in a step")  # The signal came after the save: this kill is still to be done.
    executioner.watch(SaveBegins(8))
    assert executioner.moment is not None
    executioner.watch(SaveDone(6, seconds=60.0, nbytes=1))  # The save before, which was slow.
    assert executioner.moment is not None
    executioner.struck("staged")  # Which is in the middle of a save, too.
    executioner.watch(SaveBegins(10))
    assert executioner.moment is None


def test_a_kill_after_staging_is_aimed_when_a_snapshot_is_staged() -> None:
    executioner = Executioner([Kill(3, "staged", fraction=0.5)])
    executioner.watch(SaveBegins(4))
    executioner.watch(SaveReturned(4, seconds=60.0))
    assert executioner.moment is None
    for missed in ("in a step", "in a save"):
        executioner.watch(Staged(4, seconds=60.0))
        assert executioner.moment is not None
        assert executioner.moment <= time.monotonic()
        executioner.struck(missed)
        assert executioner.moment is None
    executioner.watch(Staged(4, seconds=60.0))
    executioner.watch(SaveDone(4, seconds=60.0, nbytes=1))
    assert executioner.moment is None
    executioner.watch(Staged(6, seconds=60.0))
    executioner.struck("staged")
    executioner.watch(Staged(8, seconds=60.0))
    assert executioner.moment is None


def test_a_kill_in_a_step_is_aimed_once_whatever_happens_meanwhile() -> None:
    executioner = Executioner([Kill(3, "in a step", fraction=0.5)])
    executioner.watch(StepDone(2, loss=1.0, seconds=60.0))
    assert executioner.moment is None
    executioner.watch(StepDone(3, loss=1.0, seconds=60.0))
    moment = executioner.moment
    assert moment is not None
    executioner.watch(SaveBegins(3))
    executioner.watch(Staged(3, seconds=0.1))
    executioner.watch(SaveDone(3, seconds=0.1, nbytes=1))
    executioner.watch(StepDone(4, loss=1.0, seconds=60.0))
    assert executioner.moment == moment


def test_a_life_stands_in_a_save_until_that_is_durable() -> None:
    life = Life([Resumed(0, 0.0), StepDone(1, loss=1.0, seconds=0.1)])
    moments = []
    for event in (
        SaveBegins(1),
        Staged(1, seconds=0.1),
        SaveReturned(1, seconds=0.1),
        SaveBegins(2),  # which waits for the one before
        SaveDone(1, seconds=0.2, nbytes=1),
        SaveReturned(2, seconds=0.1),
        Staged(2, seconds=0.3),
        SaveDone(2, seconds=0.4, nbytes=1),
    ):
        life.events.append(event)
        moments.append(life.moment())
    assert moments == ["in a save", *["staged"] * 3, *["in a save"] * 2, "staged", "in a step"]


def test_a_landing_is_counted_for_a_life_only_if_no_later_one_saved_the_same_step() -> None:
    events: list[Event] = [Resumed(2, 0.0), SaveBegins(4), Staged(4, 0.1), SaveDone(4, 0.2, 1)]
    life = Life([*events, SaveBegins(6), Staged(6, 0.1), SaveBegins(8)], 1.0, Killed(8, "staged"))
    assert what_became_of(life, [], {2, 4, 6}, {4, 6}) == ([6], [])
    assert what_became_of(life, [], {2, 4, 6, 8}, {6, 8}) == ([6, 8], [])
    assert what_became_of(life, [], {2, 4, 6}, set()) == ([], [])  # It was there before the kill, though not told of.
    assert what_became_of(life, [], {2, 4}, set()) == ([], [6])
    assert what_became_of(life, [Life([Resumed(4, 0.0)])], {2, 4, 6}, {6}) == ([6], [])
    assert what_became_of(life, [Life(), Life([Resumed(4, 0.0), SaveBegins(6)])], {2, 4, 6}, {6}) == ([], [])
    assert what_became_of(life, [Life([Resumed(4, 0.0), SaveBegins(6)])], {2, 4}, set()) == ([], [])


def test_figures_count_kills_repetitions_and_stalls() -> None:
    def steps(first: int, last: int, held: float = 0.0) -> list[Event]:
        return [StepDone(step, 1.0, 0.5, held if step == first else 0.0) for step in range(first, last + 1)]

    def save(step: int, stall: float, nbytes: int) -> list[Event]:
        return [
            SaveBegins(step),
            Staged(step, seconds=stall / 2),
            SaveReturned(step, seconds=stall),
            SaveDone(step, stall * 2, nbytes),
        ]

    lives = [
        Life([Resumed(0, 0.0), *steps(1, 5), *save(5, 0.1, 1000), *steps(6, 8, 0.1)], 3.0, Killed(8, "in a step")),
        Life([Resumed(5, 0.1), *steps(6, 10), SaveBegins(10)], 4.0, Killed(10, "in a save")),
        Life(
            [Resumed(5, 0.3, ("damaged",)), *steps(6, 10), SaveBegins(10), Staged(10, 0.2)],
            6.0,
            Killed(10, "staged"),
            landed=[10],
        ),
        Life([Resumed(10, 0.2), *steps(11, 12), *save(12, 0.4, 2000)], 5.0),
    ]
    assert repeated_steps(lives) == [3, 5, 0]
    figures = figures_of(lives)
    assert (figures.kills, figures.kills_in_save, figures.kills_after_staging) == (3, 2, 1)
    assert (figures.steps, figures.steps_repeated) == (12, 8)
    assert (figures.checkpoints, figures.landed_after_kill) == (3, 1)
    assert (figures.checkpoint_bytes, figures.passed_over) == (2000, 1)
    # The first save's stall is half until it returned, and half of the step after it.
    assert figures.stall.median == pytest.approx(0.3)
    assert figures.stall.longest == pytest.approx(0.4)
    assert figures.stall_share == pytest.approx(0.6 / (20 * 0.5 + 0.1 + 0.4))
    assert figures.staging == Spread(median=0.2, longest=0.2)
    assert figures.durable == Spread(median=pytest.approx(0.5), longest=0.8)
    assert figures.load_median_seconds == pytest.approx(0.2)
    assert figures.restart_median_seconds == 5.0
    assert figures_of([Life()]).stall_share == 0.0


def test_events_travel_as_lines() -> None:
    for event in (
        Resumed(3, 0.25, ("step-4 is damaged:\nbyte 3",), checkpoint_process=7),
        StepDone(4, 0.1 + 0.2, 1e-9, 1e-10),
        Staged(4, 1 / 3),
    ):
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

    def kill_it(event: Event | Killed | Landed) -> None:
        if isinstance(event, StepDone):
            (child,) = _children() - before
            os.kill(child, signal.SIGKILL)

    kills = [Kill(10**6, "in a step", fraction=0.5)]
    with pytest.raises(TrainingFailedError, match=r"signal 9 .*the demo did not send"):
        run_to_the_end(tiny_settings(tmp_path, steps=100_000), kills, tmp_path / "log", kill_it)


def test_ctrl_c_leaves_no_child_behind_and_no_checkpoint_process(tmp_path: Path) -> None:
    before = _children()
    pids = []
    writers = []

    def press_ctrl_c(event: Event | Killed | Landed) -> None:
        assert isinstance(event, Resumed)
        assert event.checkpoint_process is not None
        pids.extend(_children() - before)
        writers.append(os.pidfd_open(event.checkpoint_process))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_the_end(tiny_settings(tmp_path, steps=100_000), [], tmp_path / "log", press_ctrl_c)
    assert len(pids) == 1
    assert not _is_running(pids[0])
    assert has_ended(writers[0])


def test_what_lands_after_the_kill_is_told_from_what_was_there(tmp_path: Path) -> None:
    def publish(step: int) -> None:
        (tmp_path / f"step-{step}").mkdir(exist_ok=True)
        (tmp_path / "new").write_text("a checkpoint")
        (tmp_path / "new").rename(tmp_path / f"step-{step}" / "checkpoint_0.pt")

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        survivor = Survivor(process.pid, tmp_path)
        publish(2)
        publish(4)
        (tmp_path / "step-8").mkdir()  # What a save that is dropped leaves.
        survivor.trainer_was_killed()
        assert survivor.checkpoints() == ({2, 4}, set())
        publish(4)
        publish(6)
        assert survivor.checkpoints() == ({2, 4, 6}, {4, 6})
        assert not survivor.has_ended()
        process.stdin.close()
        assert survivor.has_ended(PATIENCE_SECS)
