"""Ranks that torchrun starts again: new processes, a new job, the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.distributed import restarted_script
from tests.manager.runs import directories

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.types import RankInfo


@pytest.mark.timeout(300)
def test_after_a_rank_was_killed_in_a_save_torchruns_next_attempt_resumes_and_saves(tmp_path: Path) -> None:
    root, notes = tmp_path / "run", tmp_path / "notes"
    notes.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    attempts = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    project = str(Path(__file__).parents[2])
    # Without the last one, the processes of the second attempt find addresses of the first attempt's in torchrun's own
    # store, and fail to connect before they come to anything of lastgood's.
    changed = {"PYTHONPATH": project, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(
        [*torchrun, *attempts, restarted_script.__file__, str(root), str(notes)],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = {note.name: note.read_text() for note in notes.iterdir()}
    assert told == {
        "life-0-rank-0": "None 0 0.0",
        "life-0-rank-1": "None 0 1.0",
        "life-1-rank-0": "1 1 10.0",
        "life-1-rank-1": "1 1 11.0",
    }
    assert directories(root) == ["step-1", "step-2", "step-3"]
    for step in (1, 2, 3):
        for rank in range(2):
            state, _ = CheckpointReader(RankInfo(rank, 2)).read(str(root / f"step-{step}"))
            assert state["step"] == step
            assert state["weights"][-1].item() == 10 * step + rank
    assert json.loads((root / "lastgood-epoch.json").read_text())["epoch"]["epoch"] == 2
