"""``lastgood verify``: exit status and words tell what is whole and what is not."""

import shutil
from pathlib import Path

import torch
from tests.cli.commands import NOTING_TORCH, assert_one_line_of_error, run, run_in_terminal, run_json, save_steps
from tests.helpers.saves import commit_together
from tests.unit.loading.files import archive_of, flip

import lastgood


def damaged_file(path: Path) -> Path:
    lastgood.save({"model": {"first": torch.ones(1000), "second": torch.ones(30_000)}}, path)
    with archive_of(path) as archive:
        flip(path, archive.layout.storages[1].data_offset + 77)
    return path


def test_what_is_whole_ends_with_status_0_without_torch(tmp_path: Path) -> None:
    lastgood.save({"w": torch.ones(10)}, tmp_path / "x.pt")
    done = run("verify", tmp_path / "x.pt", program=NOTING_TORCH)
    assert (done.returncode, done.stderr) == (0, "torch imported: False\n")
    assert done.stdout.startswith(f"good: {tmp_path / 'x.pt'} (1 file, ")


def test_damage_ends_with_status_1_and_names_file_and_tensor(tmp_path: Path) -> None:
    path = damaged_file(tmp_path / "x.pt")
    done = run("verify", path)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"DAMAGED: {path}" in done.stdout
    assert "'model.second'" in done.stdout
    assert "'model.first'" not in done.stdout
    document = run_json("verify", path, status=1)
    assert document["good"] is False
    (problem,) = document["checkpoints"][0]["problems"]
    assert (problem["file"], problem["tensor"]) == (str(path), "model.second")


def test_of_a_run_every_step_is_verified(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    done = run("verify", tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("good: ") == 3
    assert "3 of 3 checkpoints are whole" in done.stdout
    flip(tmp_path / "step-2" / "checkpoint_0.pt", 100)
    done = run("verify", tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("good: ") == 2
    assert "2 of 3 checkpoints are whole" in done.stdout
    assert run("verify", tmp_path, "--step", "3").returncode == 0
    assert run("verify", tmp_path, "--step", "2").returncode == 1


def test_unfinished_and_set_aside_steps_are_passed_over_and_named(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-2").rename(tmp_path / "step-2.set-aside")
    flip(tmp_path / "step-2.set-aside" / "checkpoint_0.pt", 100)
    done = run("verify", tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("passed over: ") == 2
    everything = run_json("verify", tmp_path, "--all", status=1)
    assert [report["path"] for report in everything["checkpoints"] if report["problems"]] == [
        str(tmp_path / "step-2.set-aside")
    ]
    assert len(everything["skipped"]) == 1


def test_a_checkpoint_of_several_ranks_is_verified_with_its_manifest(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "step-1", 1) == [None, None]
    assert "2 files" in run("verify", tmp_path).stdout
    shutil.copy(tmp_path / "step-1" / "checkpoint_0.pt", tmp_path / "step-1" / "checkpoint_1.pt")
    assert run("verify", tmp_path).returncode == 1


def test_files_of_torchs_are_verified_as_far_as_can_be(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "zip.pt")
    torch.save({"w": torch.ones(1000)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert run("verify", tmp_path / "zip.pt").returncode == 0
    legacy = run("verify", tmp_path / "legacy.pt")
    assert legacy.returncode == 0
    assert "no checksums" in legacy.stdout


def test_nothing_there_and_nothing_known_are_status_2_and_1(tmp_path: Path) -> None:
    assert_one_line_of_error(run("verify", tmp_path / "missing"), 2, "no checkpoint at")
    assert_one_line_of_error(run("verify", tmp_path), 2, "no file of the name")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert "does not begin like a file" in run("verify", tmp_path / "notes.txt").stdout
    assert run("verify", tmp_path / "notes.txt").returncode == 1


def test_in_a_terminal_the_verdict_is_coloured(tmp_path: Path) -> None:
    assert "\x1b[1;31mDAMAGED" in run_in_terminal("verify", damaged_file(tmp_path / "x.pt"))
