"""A real training under torchrun: killed as a whole, it goes on with other numbers of ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.fsdp_training import loss_of, new_batches, new_model, new_optimizer

from lastgood import CheckpointReader, RankInfo
from lastgood.cli._demo.fingerprint import fingerprint

pytestmark = pytest.mark.long

STEPS, SAVE_EVERY = 14, 3
SCRIPT = Path(__file__).with_name("fsdp_training.py")
EXAMPLE = SCRIPT.parents[2] / "examples" / "train_fsdp.py"


def start(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def reports(training: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert training.stdout is not None
    for line in training.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def descendants(pid: int) -> list[int]:
    """All processes that this one has started, and those that they have: workers, and their checkpoint processes."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def kill_whole(training: subprocess.Popen[str]) -> None:
    """SIGKILL for every process of the job, at once: none of them can do anything about the death of another."""
    everybody = descendants(training.pid)
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    for pid in {*everybody, *descendants(training.pid)}:
        os.kill(pid, signal.SIGKILL)
    training.wait(60)


def run(root: Path, ranks: int, kill_after: int | None) -> dict[str, Any]:
    """What was reported by a training that is killed once it has reported a step, or runs to its end."""
    told: dict[str, Any] = {"losses": {}, "saved": {}}
    with start(ranks, SCRIPT, root, STEPS, SAVE_EVERY) as training:
        try:
            for report in reports(training):
                if "step" in report:
                    told["losses"][report["step"]] = report["loss"]
                    if report["step"] == kill_after:
                        kill_whole(training)
                elif "saved" in report:
                    told["saved"][report["saved"]] = report["weights"]
                else:
                    told.update(report)
            assert training.wait(60) == 0 or kill_after is not None
        finally:
            if training.poll() is None:
                kill_whole(training)
    return told


def one_process() -> dict[int, float]:
    """The losses of the same training without any distribution."""
    model = new_model()
    optimizer, batches = new_optimizer(model), new_batches()
    losses = {}
    for step in range(1, STEPS + 1):
        loss = loss_of(model, *batches.next_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
    return losses


@pytest.mark.timeout(300)
def test_a_training_killed_with_four_ranks_goes_on_with_two_and_then_with_three(tmp_path: Path) -> None:
    root = tmp_path / "run"
    first = run(root, 4, kill_after=8)
    second = run(root, 2, kill_after=10)
    third = run(root, 3, kill_after=None)

    assert [told["resumed"] for told in (first, second, third)] == [0, 6, 9]
    assert third["finished"]
    # Right after each resume the weights are, bit for bit, those that were saved, and those that the files hold.
    assert second["weights"] == first["saved"][6]
    assert third["weights"] == second["saved"][9]
    for step, saved in ((6, first["saved"][6]), (9, second["saved"][9]), (12, third["saved"][12])):
        state, _ = CheckpointReader(RankInfo(0, 1)).read(str(root / f"step-{step}"))
        assert fingerprint(state["model"]) == saved
    # The loss goes on as if nothing had happened, but for the order in which numbers are added up.
    expected = one_process()
    losses = {**first["losses"], **second["losses"], **third["losses"]}
    assert sorted(losses) == list(range(1, STEPS + 1))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step
    repeated = set(first["losses"]) & set(second["losses"])
    assert repeated == {7, 8}
    for step in repeated:
        assert second["losses"][step] == pytest.approx(first["losses"][step], rel=1e-4)
    assert torch.isfinite(torch.tensor(list(losses.values()))).all()


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_the_example_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    for ranks, expected in ((2, "starting afresh with 2"), (3, "resumed at step 1000 with 3")):
        with start(ranks, EXAMPLE, tmp_path / "run") as training:
            out, _ = training.communicate(timeout=200)
        assert training.returncode == 0
        assert expected in out
