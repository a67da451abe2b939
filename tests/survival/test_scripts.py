"""Hazard 18b: scripts that end without waiting for their last save, each in an interpreter of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.survival.traces import names
from tests.survival.trainers import file_in

import lastgood

EXITS = Path(__file__).with_name("exits.py")
STATUS_OF = {"end": 0, "sys.exit": 7, "exception": 1, "fork": 0, "fails": 0}


class Ended:
    """How one script ended, and what it said."""

    def __init__(self, directory: Path, status: int) -> None:
        self.directory = directory
        self.status = status
        self.said, self.complained = ((directory / name).read_text() for name in ("said", "complained"))


def run_scripts(directory: Path, at_once: int, endings: list[str], timeout_secs: float = 110) -> list[Ended]:
    command = [sys.executable, "-W", "error", str(EXITS), str(directory), str(at_once), *endings]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_secs)
    assert (done.returncode, done.stderr) == (0, "")
    statuses = json.loads(done.stdout)
    return [Ended(directory / str(number), status) for number, status in enumerate(statuses)]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    endings = list(STATUS_OF)
    return dict(zip(endings, run_scripts(tmp_path_factory.mktemp("scripts"), 2, endings), strict=True))


def assert_lands(directory: Path, step: int) -> None:
    """It is there as soon as the script has ended: nobody waits for anything more."""
    path = directory / f"step-{step}"
    found = lastgood.load(file_in(path))
    assert found["step"] == step
    assert torch.equal(found["weights"], torch.full((2_000_000,), float(step)))
    assert names(path) == ["checkpoint_0.pt"]


@pytest.mark.parametrize("ending", ["end", "sys.exit", "exception", "fork"])
def test_hazard_18b_a_script_that_ends_without_waiting_has_its_last_checkpoint(
    scripts: dict[str, Ended], ending: str
) -> None:
    ended = scripts[ending]
    assert ended.status == STATUS_OF[ending], ended.complained
    for step in (1, 2):
        assert_lands(ended.directory, step)
    assert ended.said == ""
    if ending == "exception":
        assert ended.complained.rstrip().endswith("LookupError: the user's own fault")
    else:
        assert ended.complained == ""


def test_hazard_18b_a_script_whose_last_save_fails_says_so_at_its_end(scripts: dict[str, Ended]) -> None:
    ended = scripts["fails"]
    assert ended.status == STATUS_OF["fails"], ended.complained
    assert_lands(ended.directory, 1)
    assert not (ended.directory / "step-2").exists()
    assert "a save that nobody waited for failed" in ended.complained
    assert f"{ended.directory}/file is a file, not a directory" in ended.complained
    assert "StorageError" in ended.complained


@pytest.mark.crash
@pytest.mark.timeout(1800)
def test_hazard_18b_a_hundred_scripts_end_without_a_word_and_with_their_checkpoints(tmp_path: Path) -> None:
    """Threads that the end of the interpreter finds at work can bring it down: seldom, so it takes many at a time."""
    for ended in run_scripts(tmp_path, 6, ["end"] * 100, timeout_secs=1700):
        assert (ended.status, ended.said, ended.complained) == (0, "", "")
        assert_lands(ended.directory, 2)
        shutil.rmtree(ended.directory)
