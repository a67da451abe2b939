"""What a synchronous save costs in memory, whatever the size of the state: measured by the kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.helpers.workers import Worker

import lastgood
from lastgood.builder import make_sync_checkpointer

MIB = 1 << 20
ALLOWED = 64 * MIB


def peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("no VmHWM in /proc/self/status")


def extra_memory_of_a_save(directory: str, tensors: int, elements: int, single_file: bool) -> int:
    """By how many bytes the peak of resident memory rises, after a small save has warmed everything up."""

    def save(name: str, state: dict[str, torch.Tensor]) -> None:
        if single_file:
            lastgood.save(state, f"{directory}/{name}.pt")
        else:
            make_sync_checkpointer().save(f"{directory}/{name}", state)

    state = {f"layers.{number}.weight": torch.ones(elements) for number in range(tensors)}
    save("small", {"w": torch.ones(1000)})
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    save("large", state)
    return peak() - before


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
@pytest.mark.parametrize("single_file", [False, True], ids=["checkpointer", "single-file"])
@pytest.mark.parametrize(("tensors", "elements"), [(4, 25_000_000), (20_000, 5_000)], ids=["large", "many"])
def test_a_save_of_400_mb_needs_64_mib_at_most(
    worker: Worker, tmp_path: Path, tensors: int, elements: int, single_file: bool
) -> None:
    extra = worker.call(extra_memory_of_a_save, str(tmp_path), tensors, elements, single_file)
    print(f"{extra / MIB:.1f} MiB")
    assert extra <= ALLOWED
    [file] = [file for file in tmp_path.rglob("*.pt") if file.stat().st_size > 300 * MIB]
    file.unlink()  # pytest keeps the directories of its last runs
