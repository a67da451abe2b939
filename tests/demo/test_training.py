"""The training script resumes to the bit, falls back past damage, and never deletes what it may still need."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from tests.demo.runs import Interrupted, interrupt_at, tiny_settings

from lastgood.cli._demo.comparison import compare
from lastgood.cli._demo.fingerprint import differences, fingerprint
from lastgood.cli._demo.protocol import Event, Finished, Resumed, SaveBegins, SaveDone, StepDone
from lastgood.cli._demo.supervisor import Life
from lastgood.cli._demo.training import make_deterministic, train
from lastgood.errors import LastgoodError


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
    ("moment", "step", "resumed_at"), [(StepDone, 1, 0), (StepDone, 5, 4), (SaveBegins, 6, 4), (SaveDone, 6, 6)]
)
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, unbroken: str, moment: type[StepDone | SaveBegins | SaveDone], step: int, resumed_at: int
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
    assert _names(tmp_path) == ["step-1", "step-2.backup", "step-4", "step-6", "step-8"]


def test_a_failing_save_deletes_nothing(tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if isinstance(event, SaveBegins) and event.step == 8:
            (tmp_path / "step-8").write_text("in the way")

    with pytest.raises(LastgoodError, match="step-8"):
        train(tiny_settings(tmp_path), report)
    shutil.move(tmp_path / "step-8", tmp_path / "out-of-the-way")
    assert {"step-2", "step-4", "step-6"} <= set(_names(tmp_path))
    assert _run(tmp_path)[0].step == 6


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
