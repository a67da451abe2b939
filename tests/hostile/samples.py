"""Small checkpoints that are whole, and a worker that reads what tests make of them."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.helpers.sharded import row, save_spread
from tests.helpers.workers import Worker
from tests.hostile import reading
from tests.hostile.reading import MEBIBYTE, NO_DEVICE, REFUSALS, SECONDS, SPARE, STEP, TARGETS_REFUSED, Outcome, Reading
from tests.unit.contents.samples import every_kind
from tests.unit.sharding.ballots import rank_file

from lastgood.format.spec import DTYPES


class Sample(NamedTuple):
    """A checkpoint directory, how many ranks wrote it, and the bytes of its files while they were whole."""

    directory: Path
    ranks: int
    whole: dict[str, bytes]

    def restore(self) -> None:
        """Make it whole again."""
        for name, data in self.whole.items():
            (self.directory / name).write_bytes(data)


def small_state(seed: int = 1) -> dict[str, Any]:
    """Two tensors that share nothing, one of them not contiguous, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(3, 4, generator=generator).t()
    return {"model": {"w": weight, "b": torch.rand(5, generator=generator).bfloat16()}, "epoch": 3, "note": "text"}


def exotic_state() -> dict[Any, Any]:
    """A tensor of each dtype, and values of every kind, those that only the pickle describes among them."""
    dtypes = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some dtypes are new to torch
        return every_kind() | {f"of {name}": torch.ones(2, 2).to(dtype) for name, dtype in dtypes.items()}


def _directory(root: Path) -> Path:
    directory = root / f"step-{STEP}"
    directory.mkdir(parents=True)
    return directory


def _sample(directory: Path, ranks: int) -> Sample:
    return Sample(directory, ranks, {file.name: file.read_bytes() for file in sorted(directory.iterdir())})


def single(root: Path, state: Any) -> Sample:
    """The checkpoint of one rank."""
    directory = _directory(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rank_file(directory, 0, 1, state)
    return _sample(directory, 1)


def theirs(root: Path, state: Any, **options: Any) -> Sample:
    """A file of torch's under the name of a checkpoint of one rank."""
    directory = _directory(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, directory / "checkpoint_0.pt", **options)
    return _sample(directory, 1)


def spread(root: Path) -> Sample:
    """The checkpoint of two ranks: a tensor divided between them, one on both, and values of each one's own."""
    directory = _directory(root)
    generator = torch.Generator().manual_seed(2)
    state = {"w": torch.rand(4, 3, generator=generator), "both": torch.rand(3, generator=generator), "epoch": 3}
    save_spread(directory, state, row(2, "dp"), {"w": ["S(0)"]}, lambda rank: {"own": torch.tensor([rank])})
    return _sample(directory, 2)


class Reader:
    """A worker that knows the samples; :meth:`read` checks what holds for every file, whatever is wrong with it."""

    def __init__(self) -> None:
        self._worker = Worker()
        self._learned: set[Path] = set()

    def close(self) -> None:
        """End the worker."""
        self._worker.kill()

    def read(self, sample: Sample, *, ways: Iterable[str] = (), spare: int = SPARE) -> Reading:
        """How all ways of reading (or those named) end with what stands in the sample's directory now.

        None of them crashes, hangs, runs, imports or writes anything, takes more memory than the files have bytes and
        ``spare``, or raises what is none of the errors for files; every error says why, and which path it is about.
        """
        self.learn(sample)
        try:
            found: Reading = self._worker.call(reading.read, str(sample.directory), sample.ranks, tuple(ways))
        except (AssertionError, EOFError):  # it says nothing, or is dead
            self._worker.kill()
            self._worker, self._learned = Worker(), set()
            raise
        size = sum(file.stat().st_size for file in sample.directory.iterdir())
        assert not found.events, found.events
        assert found.seconds < SECONDS, found
        assert found.memory < size + spare, (found.memory / MEBIBYTE, found)
        for outcome in found.outcomes:
            self._judge(outcome, sample)
        return found

    def learn(self, sample: Sample) -> None:
        """Read the sample while it is whole, if that has not been done."""
        if sample.directory in self._learned:
            return
        now = {name: (sample.directory / name).read_bytes() for name in sample.whole}
        sample.restore()
        self._worker.call(reading.learn, str(sample.directory), sample.ranks)
        self._learned.add(sample.directory)
        whole: Reading = self._worker.call(reading.read, str(sample.directory), sample.ranks)
        for outcome in whole.outcomes:
            assert (outcome.error, outcome.same) == ("", True), outcome
        for name, data in now.items():
            (sample.directory / name).write_bytes(data)

    @staticmethod
    def _judge(outcome: Outcome, sample: Sample) -> None:
        if not outcome.error or (outcome.error == NO_DEVICE and outcome.way.startswith(("load", "map"))):
            return
        allowed = {error.__name__ for error in REFUSALS}
        if outcome.way not in ("verify", "inspect", "entry"):
            allowed |= {error.__name__ for error in TARGETS_REFUSED}
        assert outcome.error in allowed, outcome
        assert len(outcome.message) > 20, outcome
        assert str(sample.directory) in outcome.message, outcome


def write(sample: Sample, name: str, data: bytes) -> None:
    """Put these bytes in the place of one of the sample's files."""
    (sample.directory / name).write_bytes(data)
