"""Memory while loading, measured in a process of its own: the file's size and a constant, or the constant alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.workers import Worker

import lastgood

MEBIBYTE = 1024 * 1024
SPARE = 64 * MEBIBYTE
SIZE = 300 * MEBIBYTE


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 MiB in tensors of several sizes, as our file and as torch's."""
    path = tmp_path_factory.mktemp("large")
    state: dict[str, Any] = {f"large{number}": torch.full((MEBIBYTE * 25 // 4,), float(number)) for number in range(11)}
    state["small"] = [torch.full((2560,), float(number)) for number in range(2560)]
    lastgood.save(state, path / "ours")
    torch.save({"large": torch.ones(SIZE // 4)}, path / "theirs")
    yield path
    for name in ("ours", "theirs"):
        os.unlink(path / name)


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.kill()


class _Peak:
    """By how much the most resident memory of this process exceeds what it has now, in bytes.

    Pages of files that are only mapped or read into the page cache do not count as long as nobody touches them.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._now("VmHWM")

    def growth(self) -> int:
        return self._now("VmHWM") - self._before

    @staticmethod
    def _now(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def load_whole(path: str, options: dict[str, Any]) -> int:
    peak = _Peak()
    loaded = lastgood.load(path, **options)
    assert len(loaded) > 0
    return peak.growth()


def load_in_place(path: str, options: dict[str, Any], transposed: bool = False) -> int:
    state = lastgood.load(path)
    target: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            target[name] = torch.zeros(value.shape)
            if transposed:  # a target with a gap after each element cannot be read into
                target[name] = torch.zeros(2 * len(value))[::2]
        else:
            target[name] = [torch.zeros(item.shape) for item in value]
    del state, value
    peak = _Peak()
    lastgood.load(path, target, **options)
    growth = peak.growth()
    assert float(target["large10"][-1]) == 10.0
    assert float(target["small"][-1][-1]) == float(len(target["small"]) - 1)
    return growth


def load_a_part(path: str) -> int:
    peak = _Peak()
    made = lastgood.load(path, {"large3": None})
    assert float(made["large3"][5]) == 3.0
    return peak.growth()


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"verify_first": True}], ids=str)
def test_a_load_in_place_costs_a_constant(directory: Path, worker: Worker, options: dict[str, Any]) -> None:
    assert worker.call(load_in_place, str(directory / "ours"), options) < SPARE


def test_a_load_into_targets_of_other_strides_costs_a_constant(directory: Path, worker: Worker) -> None:
    assert worker.call(load_in_place, str(directory / "ours"), {}, True) < SPARE


def numbered_rows() -> torch.Tensor:
    """256 MiB: in each row its number, but for the ends of the diagonal."""
    rows = torch.arange(8192.0).unsqueeze(1) + torch.zeros(8192)
    rows[0, 0], rows[8191, 8191] = -1, -2
    return rows


def load_one_large_transposed(path: str) -> int:
    target = torch.zeros(8192, 8192).t()
    peak = _Peak()
    lastgood.load(path, {"w": target})
    growth = peak.growth()
    assert torch.equal(target, numbered_rows())
    return growth


def test_a_single_tensor_of_any_size_passes_through_in_parts(tmp_path: Path, worker: Worker) -> None:
    lastgood.save({"w": numbered_rows()}, tmp_path / "one")
    assert worker.call(load_one_large_transposed, str(tmp_path / "one")) < SPARE
    os.unlink(tmp_path / "one")


@pytest.mark.parametrize("options", [{}, {"verify": False}], ids=str)
@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_a_whole_load_costs_the_size_and_a_constant(
    directory: Path, worker: Worker, name: str, options: dict[str, Any]
) -> None:
    assert worker.call(load_whole, str(directory / name), options) < os.path.getsize(directory / name) + SPARE


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_mapping_costs_a_constant(directory: Path, worker: Worker, name: str) -> None:
    assert worker.call(load_whole, str(directory / name), {"mmap": True}) < SPARE


def test_a_part_costs_the_part(directory: Path, worker: Worker) -> None:
    assert worker.call(load_a_part, str(directory / "ours")) < 25 * MEBIBYTE + SPARE
