"""``lastgood prune``: what goes, what stays, and that nothing goes unless somebody says so."""

import shutil
from pathlib import Path
from typing import Any

import pytest
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

from lastgood.format.manifest import MANIFEST_NAME
from lastgood.manager.catalog import read_catalog
from lastgood.manager.retention import KeepLast, rules_to_json
from lastgood.manager.run_log import RemoveRecord, read_run_log

LAST_2: dict[str, Any] = rules_to_json([KeepLast(2)])[0]


def _steps(judged: list[dict[str, Any]]) -> list[int]:
    return [one["step"] for one in judged]


def _names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    save_steps(root, [10, 20, 30, 40, 50])
    return root


def test_without_yes_it_only_says_what_would_go_and_why(root: Path) -> None:
    before = tree(root)
    done = run("prune", root, "--keep", "last=2", "--keep", "best=1:loss:max")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(root) == before
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for step in ("20", "30"):
        assert "would remove" in lines[step]
        assert "step 50 is newer and committed" in lines[step]
    assert "keep" in lines["10"]
    assert "best by loss (max)" in lines["10"]
    assert "one of the last 2; the newest" in lines["50"]
    freed = sum((root / f"step-{step}" / "checkpoint_0.pt").stat().st_size for step in (20, 30))
    assert f"{freed / 1024:.1f} KiB freed. Nothing has been changed." in done.stdout


def test_with_yes_it_does_what_it_said(root: Path) -> None:
    said = run_json("prune", root, "--keep", "last=2")
    did = run_json("prune", root, "--keep", "last=2", "--yes")
    assert _names(root) == {"step-40", "step-50"}
    assert (said.pop("dry_run"), did.pop("dry_run")) == (True, False)
    assert said == did
    assert _steps(did["removed"]) == [10, 20, 30]
    assert [entry.step for entry in read_catalog(STORAGE, str(root)).committed] == [40, 50]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["every=20"], [20, 40, 50]),
        (["step=10", "step=30"], [10, 30, 50]),
        (["best=2:loss"], [40, 50]),
        (["best=2:loss:max"], [10, 20, 50]),
        (["per=7200s"], [20, 40, 50]),
        (["last=1", "step=20"], [20, 50]),
        (["last=100"], [10, 20, 30, 40, 50]),
    ],
)
def test_rules_add_up(root: Path, rules: list[str], kept: list[int]) -> None:
    # Saved an hour apart from 22:13:20 on, so that spans of two hours end after the 2nd and the 4th.
    document = run_json("prune", root, *[word for rule in rules for word in ("--keep", rule)])
    assert _steps(document["kept"]) == kept
    assert _steps(document["removed"]) == sorted({10, 20, 30, 40, 50} - set(kept))


def test_without_rules_those_of_the_newest_run_hold(root: Path) -> None:
    write_log(root, run_record({"rule": "keep last", "count": 4}), run_record(LAST_2), save_record(50))
    assert _steps(run_json("prune", root)["kept"]) == [40, 50]
    write_log(root, run_record(LAST_2), run_record())  # the newest run keeps everything
    assert run_json("prune", root)["removed"] == []


def test_without_any_rules_it_asks_for_some(root: Path) -> None:
    before = tree(root)
    assert_one_line_of_error(run("prune", root, "--yes"), 2, "--keep last=3")
    assert tree(root) == before


def test_rules_that_it_does_not_know_are_not_left_out(root: Path) -> None:
    write_log(root, run_record(LAST_2, {"rule": "Mine", "is": "Mine()"}))
    before = tree(root)
    assert_one_line_of_error(run("prune", root, "--yes"), 2, "name the rules yourself")
    assert tree(root) == before


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"kind": "restore", "step": 20, "seconds": 1.0}, "the run resumed from it"),
        (save_record(20), "the last that was saved"),
    ],
)
def test_what_a_run_that_went_back_stands_on_stays(root: Path, record: dict[str, Any], reason: str) -> None:
    write_log(root, run_record(LAST_2), save_record(50), record)
    kept = run_json("prune", root)["kept"]
    assert _steps(kept) == [20, 40, 50]
    assert kept[0]["reasons"] == [reason]


def test_names_that_are_not_exactly_ours_are_never_touched(root: Path) -> None:
    for name in ("step-100.backup", "step-007", "step-20.set-aside", "best"):
        shutil.copytree(root / "step-10", root / name)
    (root / "step-5").write_text("a file")
    (root / "step-10" / "notes.txt").write_text("mine")
    (root / "step-7").mkdir()
    (root / "step-7" / "notes.txt").write_text("mine")
    (root / "link").symlink_to(root / "step-10")
    others = {"step-100.backup", "step-007", "step-20.set-aside", "best"}
    before = {name: content[2] for name, content in tree(root).items() if Path(name).relative_to(root).parts[:1]}
    document = run_json("prune", root, "--keep", "last=1", "--yes")
    assert _steps(document["removed"]) == [10, 20, 30, 40]
    assert document["cleared"] == document["skipped"] == []
    assert _names(root) == {*others, "step-5", "step-7", "step-10", "step-50", "link"}
    assert _names(root / "step-10") == {"notes.txt"}
    after = {name: content[2] for name, content in tree(root).items()}
    gone = {name for name in before if name not in after}
    assert {Path(name).relative_to(root).parts[0] for name in gone} == {"step-10", "step-20", "step-30", "step-40"}
    assert all(before[name] == after[name] for name in before if name not in gone)


def test_what_killed_saves_left_is_cleared_and_counted(root: Path) -> None:
    kill(start_writer(root / "step-15" / "checkpoint_0.pt"))
    assert commit_together(root / "step-25", 1) == [None, None]
    (root / "step-25" / MANIFEST_NAME).unlink()
    left = sum(file.stat().st_size for name in ("step-15", "step-25") for file in (root / name).iterdir())
    for more in ((), ("--yes",)):
        document = run_json("prune", root, "--keep", "every=1", *more)
        assert document["removed"] == []
        assert _steps(document["cleared"]) == [15, 25]
        assert document["nbytes_freed"] == left
    assert _names(root) == {f"step-{step}" for step in (10, 20, 30, 40, 50)}
    assert "There is nothing to remove" in run("prune", root, "--keep", "every=1").stdout


def test_what_somebody_is_writing_is_left_alone(root: Path) -> None:
    writer = start_writer(root / "step-15" / "checkpoint_0.pt")
    try:
        before = tree(root / "step-15")
        for words, status in (((), 0), (("--yes",), 1)):
            document = run_json("prune", root, "--keep", "every=1", *words, status=status)
            assert _steps(document["skipped"]) == [15]
            assert document["cleared"] == []
            assert document["nbytes_freed"] == 0
        assert tree(root / "step-15").keys() == before.keys()
        assert "left alone" in run("prune", root, "--keep", "every=1", "--yes").stdout
    finally:
        kill(writer)


def test_an_unfinished_save_after_the_newest_checkpoint_stays(root: Path) -> None:
    (root / "step-60").mkdir()
    assert run_json("prune", root, "--keep", "last=1", "--yes")["cleared"] == []
    assert _names(root) == {"step-50", "step-60"}


def test_a_removal_is_told_to_the_runs_log_if_there_is_one(root: Path) -> None:
    run_json("prune", root, "--keep", "last=4", "--yes")
    assert not (root / "lastgood.jsonl").exists()
    write_log(root, run_record(LAST_2), torn='{"kind": "save", "ste')
    run_json("prune", root)
    assert len(read_run_log(STORAGE, str(root))) == 1
    run_json("prune", root, "--yes")
    record = read_run_log(STORAGE, str(root))[-1]
    assert isinstance(record, RemoveRecord)
    assert [one.step for one in record.removed] == [20, 30]
    assert [one.step for one in record.kept] == [40, 50]


def test_a_single_checkpoint_is_not_a_run(root: Path) -> None:
    before = tree(root)
    assert_one_line_of_error(run("prune", root / "step-50", "--keep", "last=1", "--yes"), 2, "single checkpoint")
    assert_one_line_of_error(run("prune", root / "step-50" / "checkpoint_0.pt", "--keep", "last=1"), 2, "is a file")
    assert tree(root) == before
