"""``lastgood demo`` from end to end, and what of the command must work without torch."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lastgood
from lastgood.cli import app, main
from lastgood.cli._demo.fingerprint import differences
from lastgood.cli._demo.workspace import Workspace

pytestmark = pytest.mark.long

STEPS = 10


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and the output of one small demo with two kills; it prints the seed that repeats it."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    result = CliRunner().invoke(app, ["demo", "--steps", str(STEPS), "--kills", "2", "--keep", "--out", str(out)])
    print(result.output)
    assert result.exit_code == 0, result.exception
    return out, result.output


def _figure(output: str, name: str) -> str:
    found = re.search(rf"^\W*{re.escape(name)}[^│\n]*\W+(\d+)", output, re.MULTILINE)
    assert found, name
    return found.group(1)


def test_the_killed_run_ends_with_the_bits_of_the_run_never_killed(shown: tuple[Path, str]) -> None:
    out, output = shown
    # Judged here by torch's own reader, not by what the demo says of itself.
    final = f"step-{STEPS}/checkpoint_0.pt"
    reference = torch.load(out / "reference" / final, weights_only=True)
    killed = torch.load(out / "checkpoints" / final, weights_only=True)
    assert differences(reference, killed) == []
    assert len(reference["losses"]) == STEPS
    assert len(reference["optimizer"]["state"]) > 0
    assert "identical, to the last bit" in output


def test_the_kills_are_counted_and_some_were_in_the_middle_of_a_save(shown: tuple[Path, str]) -> None:
    _, output = shown
    assert int(_figure(output, "kills survived")) >= 2
    assert int(_figure(output, "of these in the middle of a save")) >= 2
    assert int(_figure(output, "of these between staged and durable")) >= 1
    assert output.count("staged, not yet durable") == int(_figure(output, "of these between staged and durable"))
    assert output.count("its checkpoint process finished") == int(_figure(output, "saves finished after"))
    assert int(_figure(output, "steps trained")) == STEPS
    # One that was there at the kill, but that its trainer had not told of any more, is not counted.
    assert int(_figure(output, "checkpoints written")) >= STEPS // 2 - 2
    assert output.count("SIGKILL after step") == int(_figure(output, "kills survived"))


def test_the_picture_marks_the_kills_and_the_last_checkpoints_are_left_without_debris(shown: tuple[Path, str]) -> None:
    out, output = shown
    picture = ElementTree.parse(out / "loss.svg")
    kills = [element for element in picture.iter() if element.get("class") == "kill"]
    assert len(kills) == int(_figure(output, "kills survived"))
    left = {path.relative_to(out / "checkpoints").as_posix() for path in (out / "checkpoints").glob("*/*")}
    # Older ones too, perhaps: a training that was killed when its last snapshot was staged has removed none for it.
    # A process killed right after it published a file leaves the lock's empty file, for retention to remove.
    left = {name for name in left if not name.endswith(".lock")}
    assert left <= {f"step-{step}/checkpoint_0.pt" for step in range(2, STEPS + 1, 2)}
    assert left >= {f"step-{step}/checkpoint_0.pt" for step in (STEPS - 4, STEPS - 2, STEPS)}


def test_output_that_is_piped_has_no_control_characters(shown: tuple[Path, str]) -> None:
    _, output = shown
    assert [character for character in output if ord(character) < 32 and character != "\n"] == []


def test_a_directory_that_the_demo_did_not_make_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "checkpoints" / "thesis.pt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for out in (tmp_path, thesis):
        monkeypatch.setattr(sys, "argv", ["lastgood", "demo", "--out", str(out)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert f"lastgood: --out {out}" in capsys.readouterr().err
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_the_runs_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identical: bool, status: int
) -> None:
    # Two runs that differ cannot be had for real: that would be the bug that the demo is there to show.
    monkeypatch.setattr("lastgood.cli._demo.show.show", lambda out, **options: identical)
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path)]).exit_code == status


@pytest.mark.parametrize(("option", "expected"), [("--help", "demo"), ("--version", lastgood.__version__)])
def test_help_and_version_do_not_wait_for_torch(option: str, expected: str) -> None:
    program = """
import sys
from lastgood.cli import main
try:
    main()
finally:
    print("torch imported:", "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program, option], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "torch imported: False" in done.stdout


def test_a_new_demo_empties_what_the_one_before_left_and_nothing_else(tmp_path: Path) -> None:
    before = Workspace(tmp_path)
    (before.checkpoints / "step-200").mkdir(parents=True)
    before.log.write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    after = Workspace(tmp_path)
    assert not after.checkpoints.exists()
    assert not after.log.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
