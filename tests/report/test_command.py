"""``lastgood report`` as a command: what it writes, what it says, and what it does without."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from html import unescape
from pathlib import Path

import pytest
import torch
from tests.report import sample_run
from typer.testing import CliRunner

import lastgood
from lastgood.cli import app
from lastgood.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from lastgood.format.archive import open_archive
from lastgood.format.spec import BLOCKS_RECORD, INDEX_RECORD
from lastgood.storage.local import LocalStorage


def _report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def _data_of(page: Path) -> dict[str, object]:
    (block,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return dict(json.loads(block))


def test_one_file_is_written_that_asks_for_nothing_else(run_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    said = _report(str(run_root), "-o", str(out))
    assert str(out) in said
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    text = out.read_text("utf-8")
    assert not re.search(r"(src|href)=[\"'](?!#)", text)
    assert "default-src &#x27;none&#x27;" in text
    assert "url(" not in text
    assert "@import" not in text


def test_json_is_the_data_of_the_page(run_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    _report(str(run_root), "-o", str(out))
    printed = json.loads(_report(str(run_root), "--json", "-o", str(tmp_path / "none.html")))
    assert not (tmp_path / "none.html").exists()
    of_page = _data_of(out)
    assert printed | {"made_at": 0} == of_page | {"made_at": 0}
    assert printed["space"]["step"] == 3000
    assert (printed["movement"]["step_a"], printed["movement"]["step_b"]) == (2990, 3000)


def test_steps_can_be_named(run_root: Path) -> None:
    printed = json.loads(_report(str(run_root), "--json", "--step", "1000", "--compare", "2000", "1000"))
    assert printed["space"]["step"] == 1000
    assert (printed["movement"]["step_a"], printed["movement"]["step_b"]) == (2000, 1000)


@pytest.mark.parametrize("options", [["--step", "17"], ["--compare", "17", "3000"]])
def test_a_step_that_is_not_there_is_named_with_those_that_are(run_root: Path, options: list[str]) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"step 17 .*2990, 3000"):
        _report(str(run_root), "--json", *options)


def test_options_that_contradict_each_other_are_refused(run_root: Path) -> None:
    with pytest.raises(ConfigError, match="--no-compare"):
        _report(str(run_root), "--compare", "2990", "3000", "--no-compare")


def test_a_root_without_a_run_is_said_to_be_none_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in ("empty", "missing"):
        with pytest.raises(CheckpointNotFoundError, match="no run at"):
            _report(str(tmp_path / root), "-o", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def _damaged(run_root: Path, tmp_path: Path, record: str) -> Path:
    """A copy of the run with one byte of its newest checkpoint changed, in a record of that name."""
    root = tmp_path / "run"
    shutil.copytree(run_root, root)
    path = root / "step-3000" / "checkpoint_0.pt"
    with closing(LocalStorage().open(str(path))) as file:
        archive = open_archive(file)
        assert archive is not None
        (offset,) = [found.data_offset for found in archive.layout.records if found.name == record]
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return root


def test_a_damaged_newest_checkpoint_is_no_good_health_and_the_one_before_is_shown(
    run_root: Path, tmp_path: Path
) -> None:
    root = _damaged(run_root, tmp_path, INDEX_RECORD)
    printed = json.loads(_report(str(root), "--json"))
    assert not printed["health"]["is_good"]
    assert "1 checkpoint cannot be what was written: step 3000." in printed["health"]["sentences"]
    assert printed["space"]["step"] == printed["movement"]["step_b"] == 2990
    with pytest.raises(CorruptCheckpointError):  # somebody who asked for this very step has to learn of it
        _report(str(root), "--json", "--step", "3000")


def test_damage_that_only_reading_shows_costs_the_sections_that_read_and_no_more(
    run_root: Path, tmp_path: Path
) -> None:
    root = _damaged(run_root, tmp_path, BLOCKS_RECORD)
    printed = json.loads(_report(str(root), "--json"))
    assert (printed["space"], printed["movement"]) == (None, None)
    assert "is damaged" in printed["space_problem"]
    assert "is damaged" in printed["movement_problem"]
    assert printed["saves"]["count"] == sample_run.SAVES
    out = tmp_path / "page.html"
    _report(str(root), "-o", str(out))
    assert printed["space_problem"] in unescape(out.read_text("utf-8"))


def test_a_run_with_a_log_and_no_checkpoint_has_a_page(tmp_path: Path) -> None:
    sample_run.write_log(tmp_path, list(sample_run.log_records(1, 20)))
    out = tmp_path / "page.html"
    _report(str(tmp_path), "-o", str(out))
    text = out.read_text("utf-8")
    assert "No checkpoint is committed: a training that starts now begins from nothing." in text
    assert "There are not two committed checkpoints to compare." in text


def test_checkpoints_without_a_log_have_a_page(tmp_path: Path) -> None:
    checkpointer = lastgood.make_sync_checkpointer()
    checkpointer.save(str(tmp_path / "step-1"), {"w": torch.zeros(3)}, step=1)
    checkpointer.close()
    out = tmp_path / "page.html"
    _report(str(tmp_path), "-o", str(out))
    assert "The run&#x27;s log tells of no saves." in out.read_text("utf-8")


def test_without_a_comparison_torch_is_not_imported(run_root: Path, tmp_path: Path) -> None:
    program = """
import sys
from lastgood.cli import main
try:
    main()
finally:
    print("torch imported:", "torch" in sys.modules)
"""
    arguments = ["report", str(run_root), "-o", str(tmp_path / "page.html"), "--no-compare"]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "torch imported: False" in done.stdout
    assert "Left out, as asked." in (tmp_path / "page.html").read_text("utf-8")
