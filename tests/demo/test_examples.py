"""The examples run, and do what they are there to show."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_and_resume.py"


def test_the_short_example_resumes_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "run")])
    first = runpy.run_path(str(EXAMPLE))
    assert first["step"] == 1000
    assert "starting afresh" in capsys.readouterr().out
    second = runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out == "resumed at step 1000\n"
    assert torch.equal(first["model"].weight, second["model"].weight)
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*"))] == ["step-1000", "step-800", "step-900"]
