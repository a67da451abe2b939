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
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "checkpoint")])
    first = runpy.run_path(str(EXAMPLE))
    first["checkpointer"].close()  # As the interpreter does at its end.
    assert first["step"] == 1000
    assert "starting afresh" in capsys.readouterr().out
    second = runpy.run_path(str(EXAMPLE))
    second["checkpointer"].close()
    assert capsys.readouterr().out == "resumed at step 1000\n"
    assert torch.equal(first["model"].weight, second["model"].weight)
