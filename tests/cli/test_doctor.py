"""``lastgood doctor``: what can be wrong with a run's directory is found, explained, and left as it is."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.commands import (
    STORAGE,
    assert_one_line_of_error,
    kill,
    run,
    run_json,
    run_record,
    save_record,
    save_steps,
    start_writer,
    tree,
    write_log,
)
from tests.helpers.saves import commit_together

from lastgood.cli._doctor.facts import Facts, look
from lastgood.cli._doctor.findings import Finding, diagnose
from lastgood.format.manifest import MANIFEST_NAME
from lastgood.manager.catalog import Catalog, Condition, Entry
from lastgood.storage.file_ops import OsFileOps


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "the run"
    save_steps(root, [10, 20, 30])
    return root


def _findings(root: Path, *, status: int = 1) -> dict[str, dict[str, Any]]:
    document = run_json("doctor", root, status=status)
    assert document["needs_action"] == (status == 1)
    findings = {finding["kind"]: finding for finding in document["findings"]}
    assert len(findings) == len(document["findings"])
    return findings


def _only(root: Path, kind: str, *, status: int = 1) -> dict[str, Any]:
    findings = _findings(root, status=status)
    assert findings.keys() == {kind}
    return findings[kind]


def _do(finding: dict[str, Any]) -> None:
    """What somebody would do who trusts the command: paste it into a shell (with the command's own program)."""
    command = finding["command"]
    if command.startswith("lastgood "):
        command = f"{os.path.dirname(sys.executable)}/{command}"
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=100)


def test_nothing_to_do_is_said_with_status_0(root: Path) -> None:
    done = run("doctor", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "3 committed checkpoints, the newest of step 30. Nothing to do.\n"
    assert run_json("doctor", root) == {"path": str(root), "latest": 30, "needs_action": False, "findings": []}


def test_every_finding_says_what_it_means_what_is_safe_and_what_to_do(root: Path) -> None:
    (root / "step-15").mkdir()
    done = run("doctor", root)
    assert done.returncode == 1
    first, *lines = done.stdout.splitlines()
    assert first == f"unfinished save: {root / 'step-15'}"
    assert [line.strip().split(":")[0] for line in lines[2:4]] == ["Safe", "To do"]
    assert lines[4].strip() == f"lastgood prune '{root}' --keep every=1 --yes"
    assert lines[-1] == "3 committed checkpoints, the newest of step 30. 1 to look at."


def test_the_debris_of_a_killed_save_is_cleared_by_the_command_it_names(root: Path) -> None:
    kill(start_writer(root / "step-15" / "checkpoint_0.pt"))
    finding = _only(root, "unfinished save")
    assert "goes on from step 30" in finding["safe"]
    _do(finding)
    assert not (root / "step-15").exists()
    _findings(root, status=0)


def test_an_unfinished_save_that_is_the_newest_may_be_saved_anew(root: Path) -> None:
    (root / "step-40").mkdir()
    finding = _only(root, "unfinished save")
    assert "Nothing, if the run goes on" in finding["do"]
    _do(finding)
    _findings(root, status=0)


def test_what_prune_would_leave_alone_is_not_sent_to_prune(root: Path) -> None:
    (root / "step-15").mkdir()
    (root / "step-15" / "notes.txt").write_text("mine")
    finding = _only(root, "unfinished save")
    assert "notes.txt" in finding["do"]
    assert finding["command"].startswith("ls ")


def test_a_save_under_way_is_no_reason_to_act(root: Path) -> None:
    writer = start_writer(root / "step-40" / "checkpoint_0.pt")
    try:
        finding = _only(root, "being written", status=0)
        assert finding["step"] == 40
        assert "alive" in finding["what"]
    finally:
        kill(writer)
    _only(root, "unfinished save")


def test_a_checkpoint_that_is_being_replaced_is_no_reason_to_act(root: Path) -> None:
    writer = start_writer(root / "step-30" / "checkpoint_0.pt")
    try:
        findings = run_json("doctor", root)["findings"]
        assert [finding["kind"] for finding in findings] == ["being written"] * 2
    finally:
        kill(writer)


def test_strays_of_dead_writers_are_found_beside_good_checkpoints(root: Path) -> None:
    kill(start_writer(root / "step-20" / "checkpoint_0.pt"))
    findings = _findings(root)
    assert findings.keys() == {"stray temporary file", "stray lock"}
    for finding in findings.values():
        assert finding["step"] == 20
        _do(finding)
    _findings(root, status=0)
    assert os.listdir(root / "step-20") == ["checkpoint_0.pt"]


def test_strays_in_the_root_itself_are_found(root: Path) -> None:
    kill(start_writer(root / "report.html"))
    assert _findings(root).keys() == {"stray temporary file", "stray lock"}


def test_rank_files_without_a_manifest_are_told_apart(root: Path) -> None:
    assert commit_together(root / "step-25", 1) == [None, None]
    (root / "step-25" / MANIFEST_NAME).unlink()
    finding = _only(root, "rank files without a manifest")
    assert "2 of 2 files are there and no manifest" in finding["what"]
    _do(finding)
    _findings(root, status=0)


def test_a_missing_rank_file_is_damage(root: Path) -> None:
    assert commit_together(root / "step-25", 1) == [None, None]
    (root / "step-25" / "checkpoint_1.pt").unlink()
    finding = _only(root, "damaged")
    assert finding["command"] == f"lastgood verify '{root / 'step-25'}'"
    assert "goes on from step 30" in finding["safe"]


def test_a_plain_torch_file_is_foreign_and_what_a_resume_tries_first(root: Path) -> None:
    (root / "step-40").mkdir()
    torch.save({"a": 1}, root / "step-40" / "checkpoint_0.pt")
    (root / "step-15").mkdir()
    findings = _findings(root)
    assert findings["foreign"]["step"] == 40
    assert "tries step 40 first, then step 30" in findings["unfinished save"]["safe"]


def test_what_was_set_aside_comes_with_the_reason_from_the_log(root: Path) -> None:
    shutil.copytree(root / "step-30", root / "step-40.set-aside")
    record = {"kind": "set aside", "step": 40, "name": "step-40.set-aside", "problem": "weights: a block is damaged"}
    write_log(root, run_record(), record)
    finding = _only(root, "set aside")
    assert finding["step"] == 40
    assert "weights: a block is damaged" in finding["what"]


def test_a_renamed_checkpoint_gets_its_name_back_by_the_command_it_names(root: Path) -> None:
    (root / "step-30").rename(root / "step-99")
    finding = _only(root, "renamed")
    assert "saved as step 30" in finding["what"]
    _do(finding)
    assert (root / "step-30").exists()
    _findings(root, status=0)


def test_a_copy_under_another_step_is_to_be_compared_not_moved(root: Path) -> None:
    shutil.copytree(root / "step-30", root / "step-99")
    finding = _only(root, "renamed")
    assert finding["command"] == f"lastgood diff '{root / 'step-30'}' '{root / 'step-99'}'"


def test_a_clock_that_was_ahead_is_told(root: Path) -> None:
    save_steps(root, [40], saved_at=time.time() + 7200)
    finding = _only(root, "saved in the future")
    assert "from now" in finding["what"]


def test_a_file_with_a_steps_name_is_told(root: Path) -> None:
    (root / "step-5").write_text("mine")
    finding = _only(root, "not a directory")
    _do(finding)
    assert (root / "step-5.file").read_text() == "mine"
    _findings(root, status=0)


def test_failures_of_the_latest_run_are_shown_with_their_errors(root: Path) -> None:
    write_log(
        root,
        run_record(),
        save_record(10, "an older run's failure"),
        run_record(),
        save_record(20),
        *[save_record(step, f"no space, step {step}") for step in (30, 40, 50, 60)],
        torn='{"kind": "save", "st',
    )
    finding = _only(root, "failed saves")
    assert "4 of the 5 saves" in finding["what"]
    assert all(f"no space, step {step}" in finding["what"] for step in (40, 50, 60))
    assert "no space, step 30" not in finding["what"]
    assert "older" not in finding["what"]


def test_failures_that_are_over_need_no_action(root: Path) -> None:
    write_log(root, run_record(), save_record(10, "no space"), save_record(20))
    assert "step 20, succeeded" in _only(root, "failed saves", status=0)["means"]


def test_a_log_that_cannot_be_read_is_told(root: Path) -> None:
    (root / "lastgood.jsonl").mkdir()
    assert "Checkpoints do not depend on the log" in _only(root, "unreadable log")["safe"]


def test_a_run_without_any_checkpoint_is_told(tmp_path: Path) -> None:
    assert _only(tmp_path, "no committed checkpoint", status=0)["command"] is None
    write_log(tmp_path, run_record(), save_record(10, "no space"))
    assert _findings(tmp_path).keys() == {"no committed checkpoint", "failed saves"}
    (tmp_path / "step-10").mkdir()
    assert "begins from nothing" in _findings(tmp_path)["no committed checkpoint"]["means"]


def test_where_none_is_good_a_resume_stops(root: Path) -> None:
    for step in (10, 20, 30):
        (root / f"step-{step}" / "checkpoint_0.pt").write_bytes(b"not any more")
    document = run_json("doctor", root, status=1)
    assert document["latest"] is None
    assert "stops with an error" in document["findings"][0]["means"]
    assert [finding["kind"] for finding in document["findings"][1:]] == ["foreign"] * 3


def test_looking_changes_nothing_byte_for_byte(root: Path) -> None:
    kill(start_writer(root / "step-15" / "checkpoint_0.pt"))
    kill(start_writer(root / "step-20" / "checkpoint_0.pt"))
    shutil.copytree(root / "step-30", root / "step-99")
    (root / "step-30" / "checkpoint_0.pt").write_bytes(b"cut off")
    (root / "step-5").write_text("mine")
    write_log(root, run_record(), save_record(10, "no space"), torn='{"kin')
    before = tree(root)
    assert run("doctor", root).returncode == 1
    assert run("doctor", root, "--json").returncode == 1
    assert tree(root) == before


def test_what_is_no_run_is_an_error(root: Path) -> None:
    assert_one_line_of_error(run("doctor", root / "none"), 2, "there is no directory")
    assert_one_line_of_error(run("doctor", root / "step-10"), 2, "lastgood verify")


# What cannot be had for real: facts go in, findings come out.


def _facts(*entries: Entry, **more: Any) -> Facts:
    return Facts(**{"root": "/run", "now": 1.7e9, "catalog": Catalog("/run", entries, ()), **more})


def _entry(step: int, condition: Condition = Condition.COMMITTED, **more: Any) -> Entry:
    return Entry(step=step, path=f"/run/step-{step}", condition=condition, nbytes=1000, **more)


def _kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


@pytest.mark.parametrize(
    ("available", "said"), [(None, None), (2000, None), (1999, "for one more"), (999, "not even for one more")]
)
def test_space_is_measured_by_the_newest_checkpoint(available: int | None, said: str | None) -> None:
    findings = diagnose(_facts(_entry(10), available=available))
    assert _kinds(findings) == ([] if said is None else ["little space"])
    assert all(str(said) in finding.what for finding in findings)


def test_what_the_operating_system_does_not_give_is_not_to_be_deleted() -> None:
    (finding,) = diagnose(_facts(_entry(10), _entry(20, Condition.UNREADABLE, problem="an I/O error")))
    assert (finding.kind, finding.step) == ("unreadable", 20)
    assert "Do not delete" in finding.do
    assert "goes on from step 10" in finding.safe


def test_clocks_may_differ_a_little() -> None:
    assert diagnose(_facts(_entry(10, saved_at=1.7e9 + 59))) == []
    assert _kinds(diagnose(_facts(_entry(10, saved_at=1.7e9 + 61)))) == ["saved in the future"]


class _NothingIsTold(OsFileOps):
    """A file system without locks, that does not say how much is left."""

    def lock(self, descriptor: int) -> bool:
        raise OSError(95, "Operation not supported")

    def available_bytes(self, path: str) -> int | None:
        raise OSError(5, "Input/output error")


def test_where_locks_do_not_tell_nobody_is_sent_to_delete(root: Path) -> None:
    kill(start_writer(root / "step-20" / "checkpoint_0.pt"))
    kill(start_writer(root / "step-25" / "checkpoint_0.pt"))
    findings = diagnose(look(STORAGE, str(root), _NothingIsTold()))
    assert [finding.step for finding in findings] == [20, 20, 25]
    assert set(_kinds(findings)) == {"perhaps being written"}
    assert not any(finding.needs_action or finding.command for finding in findings)
