"""Thousands of saves, of which retention keeps a few, while somebody reads the newest: nothing torn, nothing grows."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.long_runs.trainers import MOST_KEPT, read_until_told, save_many_times
from tests.helpers.workers import Worker
from tests.manager.runs import directories
from tests.survival.traces import names

SAMPLES = 50
FEWEST = 3
"""Of descriptors, threads and the like: what happens to be there at the moment."""

LEAK_A_SAVE = 128
NOISE_BYTES = 8 << 20
"""How much memory may seem to come with each save, and how much without any (coverage takes some, too), in bytes."""


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize(
    "saves", [75, pytest.param(5000, marks=[pytest.mark.crash, pytest.mark.timeout(1800)], id="5000")]
)
def test_many_saves_with_retention_and_a_reader_show_nothing_torn_and_let_nothing_grow(
    tmp_path: Path, saves: int, asynchronous: bool, count_cases: Callable[[str, int], None]
) -> None:
    trainer, reader = Worker(), Worker()
    root = tmp_path / "run"
    root.mkdir()
    try:
        reader.start(read_until_told, str(root), with_pipe=True)
        every = max(1, saves // SAMPLES)
        trainer.start(save_many_times, str(root), asynchronous, saves, every, with_pipe=True)
        samples = []
        while (news := trainer.receive())[0] == "costs":
            samples.append(news[1])
        assert news == ("returned", None)
        reader._pipe.send("enough")
        seen = reader.result()
    finally:
        trainer.kill()
        reader.kill()
    print(seen)
    assert_nothing_grows(samples, every)
    kept = directories(root)
    assert len(kept) <= MOST_KEPT
    assert {f"step-{step}" for step in range(saves - 2, saves + 1)} <= {*kept}
    for name in kept:
        assert names(root / name) == ["checkpoint_0.pt"]
    count_cases("saves in long runs with retention", saves)
    count_cases("reads of the newest checkpoint during long runs", seen.total() - seen["steps seen"])


def assert_nothing_grows(samples: list[dict[str, int]], every: int) -> None:
    """Compares the medians of the second fifth, when all is warm, and of the last."""
    fifth = len(samples) // 5
    between = 3 * fifth * every
    for what in samples[0]:
        warm, last = samples[fifth : 2 * fifth], samples[-fifth:]
        early, late = (statistics.median(sample[what] for sample in window) for window in (warm, last))
        most = NOISE_BYTES + LEAK_A_SAVE * between if "bytes" in what else FEWEST
        print(f"{what}: {early:,.0f}, then {late:,.0f}")
        assert late <= early + most, f"{what} grew from {early:,.0f} to {late:,.0f} in {between} saves"
    assert max(sample["directory entries"] for sample in samples) <= 2 * MOST_KEPT + 1
