"""The training script resumes to the bit, falls back past damage, and never deletes what it may still need."""

import itertools
import os
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from tests.demo.runs import Interrupted, has_ended, interrupt_at, tiny_settings
from tests.helpers.workers import PATIENCE_SECS

from lastgood import _events
from lastgood.cli._demo.comparison import compare
from lastgood.cli._demo.fingerprint import differences, fingerprint
from lastgood.cli._demo.kills import Kill
from lastgood.cli._demo.protocol import (
    Event,
    Finished,
    Resumed,
    SaveBegins,
    SaveDone,
    SaveEvent,
    SaveReturned,
    Staged,
    StepDone,
)
from lastgood.cli._demo.saves import held_back
from lastgood.cli._demo.supervisor import Killed, Landed, Life, LostSaveError, run_to_the_end
from lastgood.cli._demo.training import make_deterministic, train
from lastgood.errors import LastgoodError
from lastgood.storage.base import StorageLock
from lastgood.storage.local import LocalStorage

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(_deterministic: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the final state of a training that was never interrupted."""
    return _run(tmp_path_factory.mktemp("unbroken"))[-1].fingerprint


def _run(directory: Path) -> list[Event]:
    events: list[Event] = []
    train(tiny_settings(directory), events.append)
    assert isinstance(events[-1], Finished)
    return events


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("moment", "step", "resumed_at"),
    [(StepDone, 1, 0), (StepDone, 5, 4), (SaveBegins, 6, 4), (SaveReturned, 6, 6), (StepDone, 7, 6)],
)
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, unbroken: str, moment: type[StepDone | SaveEvent], step: int, resumed_at: int
) -> None:
    before: list[Event] = []
    with pytest.raises(Interrupted):
        train(tiny_settings(tmp_path), interrupt_at(moment, step, before))
    after = _run(tmp_path)
    assert isinstance(after[0], Resumed)
    assert (after[0].step, after[0].passed_over) == (resumed_at, ())
    assert after[-1].fingerprint == unbroken
    losses = {event.step: event.loss for event in before if isinstance(event, StepDone)}
    repeated = [event for event in after if isinstance(event, StepDone) and event.step in losses]
    assert all(event.loss == losses[event.step] for event in repeated)


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, unbroken: str) -> None:
    with pytest.raises(Interrupted):
        train(tiny_settings(tmp_path), interrupt_at(StepDone, 5, []))
    newest = tmp_path / "step-4" / "checkpoint_0.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    newest.write_bytes(damaged)

    events = _run(tmp_path)
    assert isinstance(events[0], Resumed)
    assert events[0].step == 2
    assert len(events[0].passed_over) == 1
    assert "step-4" in events[0].passed_over[0]
    assert events[-1].fingerprint == unbroken


def test_the_last_three_checkpoints_stay_and_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-2.backup").mkdir()
    (tmp_path / "step-1").mkdir()  # What a save that was killed early leaves: it must not count as one of the three.
    _run(tmp_path)
    assert _names(tmp_path) == ["lastgood.jsonl", "step-2.backup", "step-4", "step-6", "step-8"]


def test_a_failing_save_deletes_nothing(tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if isinstance(event, SaveBegins) and event.step == 8:
            (tmp_path / "step-8").write_text("in the way")

    with pytest.raises(LastgoodError, match="step-8"):
        train(tiny_settings(tmp_path), report)
    shutil.move(tmp_path / "step-8", tmp_path / "out-of-the-way")
    assert {"step-2", "step-4", "step-6"} <= set(_names(tmp_path))
    assert _run(tmp_path)[0].step == 6


def _hold(step: int, directory: Path) -> StorageLock:
    """Keeps every checkpoint process from writing the checkpoint of ``step``, as another one at work there would."""
    lock = LocalStorage().try_lock(str(directory / f"step-{step}" / "checkpoint_0.pt"))
    assert lock is not None
    return lock


def test_an_old_checkpoint_is_removed_only_when_a_newer_one_is_durable(tmp_path: Path) -> None:
    locks, found = [], []

    def report(event: Event) -> None:
        if isinstance(event, Resumed):
            locks.append(_hold(8, tmp_path))
        elif isinstance(event, Staged) and event.step == 8:
            found.extend(path.parent.name for path in tmp_path.glob("*/checkpoint_0.pt"))
            locks[0].release()

    train(tiny_settings(tmp_path), report)
    assert sorted(found) == ["step-2", "step-4", "step-6"]
    assert _names(tmp_path) == ["lastgood.jsonl", "step-4", "step-6", "step-8"]


def test_the_training_goes_on_while_a_save_waits_for_a_former_process_that_writes_the_same(tmp_path: Path) -> None:
    locks: list[StorageLock] = []
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, Resumed):
            locks.append(_hold(4, tmp_path))
        elif isinstance(event, StepDone) and event.step == 5:
            locks[0].release()

    train(tiny_settings(tmp_path), report)
    order = [(type(event), event.step) for event in events if not isinstance(event, Finished)]
    assert order.index((Staged, 4)) < order.index((SaveDone, 4))
    assert order.index((StepDone, 5)) < order.index((SaveDone, 4))


def test_every_save_is_told_of_and_is_durable_when_the_training_ends(tmp_path: Path) -> None:
    events = _run(tmp_path)
    for step in (2, 4, 6, 8):
        saves = [event for event in events if isinstance(event, SaveEvent) and event.step == step]
        assert [type(event) for event in saves[:2]] == [SaveBegins, SaveReturned]
        assert {type(event) for event in saves[2:]} == {Staged, SaveDone}
        assert all(event.nbytes > 0 for event in saves if isinstance(event, SaveDone))


def test_steps_held_back_for_a_save_are_told_from_other_phases() -> None:
    with held_back() as held:
        for name in ("hold", "stage", "hold"):
            with _events.phase(name, "AdamW"):
                pass
    with _events.phase("hold", "AdamW"):
        pass
    assert len(held) == 2


def test_what_is_staged_is_finished_although_its_trainer_was_killed_and_started_again(
    tmp_path: Path, unbroken: str
) -> None:
    checkpoints = tmp_path / "checkpoints"
    writers: list[int] = []

    def observe(event: Event | Killed | Landed) -> None:
        if isinstance(event, Resumed):
            assert event.checkpoint_process is not None
            writers.append(os.pidfd_open(event.checkpoint_process))

    kills = [Kill(2, "staged", fraction=0.5), Kill(6, "staged", fraction=0.5)]
    lives = run_to_the_end(tiny_settings(checkpoints), kills, tmp_path / "training.log", observe)
    assert len(lives) >= 3
    for life, next_life in itertools.pairwise(lives):
        # Whatever had been staged is where the next one goes on: it waits for a save that is still being written.
        assert next_life.first_step >= max(life.steps_of(Staged), default=0)
    last = lives[-1].events[-1]
    assert isinstance(last, Finished)
    assert last.fingerprint == unbroken
    assert all(has_ended(writer) for writer in writers)
    assert _names(checkpoints) == ["lastgood.jsonl", "step-4", "step-6", "step-8"]
    assert {path.name for path in checkpoints.glob("*/*")} == {"checkpoint_0.pt"}


def test_a_checkpoint_that_was_staged_and_does_not_land_is_no_secret(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    settings = msgspec.structs.replace(tiny_settings(checkpoints, steps=200), save_every=100)
    locks: list[StorageLock] = []
    writers: list[int] = []

    def observe(event: Event | Killed | Landed) -> None:
        if isinstance(event, Resumed) and not writers:
            assert event.checkpoint_process is not None
            writers.append(os.pidfd_open(event.checkpoint_process))
            # Long before the training comes there: 100 steps.
            locks.append(_hold(100, checkpoints))
            assert not (checkpoints / "step-100" / "checkpoint_0.pt").exists()
        elif isinstance(event, Killed):
            signal.pidfd_send_signal(writers[0], signal.SIGKILL)
            assert select.select(writers, [], [], PATIENCE_SECS)[0]
            locks[0].release()

    kills = [Kill(100, "staged", fraction=0.5)]
    with pytest.raises(LostSaveError, match="step 100 was staged"):
        run_to_the_end(settings, kills, tmp_path / "training.log", observe)
    assert has_ended(writers[0])


def test_a_fingerprint_sees_one_bit_anywhere_and_nothing_else() -> None:
    def state(bit: int = 0, rate: float = 0.1, dtype: torch.dtype = torch.float32) -> dict[str, object]:
        weights = torch.arange(12.0, dtype=dtype)
        if bit:
            weights.view(torch.int32)[7] ^= bit
        return {"model": {"w": weights.view(3, 4).t()}, "rates": [rate, (1, None)], 0: torch.empty(0)}

    same = state()
    assert fingerprint(same) == fingerprint(dict(reversed(state().items())))
    assert differences(same, state()) == []
    assert fingerprint(same) != fingerprint(state(bit=1))
    assert differences(same, state(bit=1)) == ["model.w"]
    assert differences(same, state(rate=0.1 + 2**-55)) == ["rates.0"]
    assert differences(same, state(dtype=torch.float64)) == ["model.w"]
    assert differences(same, {**state(), "more": 1}) == ["", "more"]


def test_runs_that_part_are_told_from_runs_that_do_not(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> tuple[Path, list[Life]]:
        settings = msgspec.structs.replace(tiny_settings(tmp_path / name, steps=2), seed=seed)
        life = Life()
        train(settings, life.events.append)
        return tmp_path / name / "step-2", [life]

    one, twin, other = run("one", seed=1), run("twin", seed=1), run("other", seed=2)
    same = compare(one, twin)
    assert same.identical
    assert all(part.reference == part.killed for part in same.parts)
    parted = compare(one, other)
    assert not parted.identical
    assert "model.head.weight" in parted.different
    assert all(part.reference != part.killed for part in parted.parts)
    # A file that holds something else than the process had in memory is no proof of anything.
    assert not compare(one, (twin[0], other[1])).identical
