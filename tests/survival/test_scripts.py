"""Hazard 18b: scripts that end without waiting for their last save, each in an interpreter of its own."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.survival.traces import names
from tests.survival.trainers import file_in

import lastgood

SCRIPT = Path(__file__).with_name("script.py")
STATUS_OF = {"end": 0, "sys.exit": 7, "exception": 1, "fork": 0, "fails": 0}


class Ended:
    """How one script ended, and what it said."""

    def __init__(self, script: "subprocess.Popen[str]", directory: Path) -> None:
        self.directory = directory
        self.said, self.complained = script.communicate(timeout=110)
        self.status = script.returncode


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All of them, run side by side: most of their time goes into importing torch."""
    running = {}
    for ending in STATUS_OF:
        directory = tmp_path_factory.mktemp(ending)
        (directory / "file").touch()
        command = [sys.executable, "-W", "error", str(SCRIPT), str(directory), ending]
        running[ending] = (
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ),
            directory,
        )
    try:
        yield {ending: Ended(*script) for ending, script in running.items()}
    finally:
        for script, _ in running.values():
            script.kill()
            script.wait()


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
    assert_lands(ended.directory, 1)
    assert not (ended.directory / "step-2").exists()
    assert "a save that nobody waited for failed" in ended.complained
    assert f"{ended.directory}/file is a file, not a directory" in ended.complained
    assert "StorageError" in ended.complained


@pytest.mark.crash
@pytest.mark.timeout(1800)
def test_hazard_18b_a_hundred_scripts_end_without_a_word_and_with_their_checkpoints(tmp_path: Path) -> None:
    """Threads that the end of the interpreter finds at work can bring it down: seldom, so it takes many."""
    command = [sys.executable, "-W", "error", str(SCRIPT.with_name("many_exits.py")), str(tmp_path), "100"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1700)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for number in range(100):
        assert_lands(tmp_path / str(number), 2)
        shutil.rmtree(tmp_path / str(number))
