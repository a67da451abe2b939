"""``lastgood ls`` against checkpoints that were really saved."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from tests.cli.commands import assert_one_line_of_error, run, run_json, save_record, save_steps, tree, write_log
from tests.helpers.saves import commit_together, save

import lastgood
from lastgood.format.manifest import MANIFEST_NAME


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with good steps 10, 20 and 200 (of two ranks), and one thing of each kind that is none."""
    root = tmp_path_factory.mktemp("ls") / "run"
    save_steps(root, [10, 20])
    assert commit_together(root / "step-200", 1) == [None, None]
    (root / "step-30").mkdir()
    torch.save({"a": 1}, root / "step-30" / "checkpoint_0.pt")
    assert commit_together(root / "step-40", 1) == [None, None]
    (root / "step-40" / "checkpoint_1.pt").unlink()
    (root / "step-300").mkdir()
    shutil.copytree(root / "step-10", root / "step-50.set-aside")
    shutil.copytree(root / "step-10", root / "step-10.backup")
    shutil.copytree(root / "step-10", root / "step-007")
    (root / "step-5").write_text("a file")
    write_log(
        root,
        save_record(10, durable_secs=9.0),
        save_record(10, durable_secs=0.84),
        save_record(20, "the disk was full"),
        torn='{"kind": "sa',
    )
    return root


def _row(listing: str, step: int) -> list[str]:
    (line,) = [line for line in listing.splitlines() if str(step) in line.split()[:2]]
    return line.split()


def test_each_step_is_one_row_with_what_there_is_to_know(root: Path) -> None:
    listing = run("ls", root).stdout
    lines = listing.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["10", "20", "30", "40", "*", "300"]
    assert _row(listing, 10)[1] == "committed"
    assert "2023-11-14 22:13:20" in listing  # in the local time of TZ, which is UTC here
    assert "loss=0.0909091" in _row(listing, 10)
    assert "0.84" in _row(listing, 10)
    assert "0.84" not in _row(listing, 20)
    assert _row(listing, 30)[1] == "foreign"
    assert _row(listing, 40)[1] == "damaged"
    assert _row(listing, 300)[1] == "unfinished"


def test_the_latest_is_the_highest_step_that_is_committed(root: Path) -> None:
    starred = [line for line in run("ls", root).stdout.splitlines() if line.startswith("*")]
    assert [line.split()[1] for line in starred] == ["200"]
    document = run_json("ls", root)
    assert document["latest"] == 200
    assert [row["step"] for row in document["steps"] if row["latest"]] == [200]


def test_what_was_set_aside_is_named_and_what_is_not_lastgoods_on_request(root: Path) -> None:
    short, long = run("ls", root).stdout, run("ls", "--all", root).stdout
    assert "set aside: step-50.set-aside" in short
    assert "step-007" not in short
    for name in ("step-007", "step-10.backup", "step-5"):
        assert f"not lastgood's: {name}\n" in long
    assert "lastgood.jsonl" not in long


def test_the_totals_count_what_is_there(root: Path) -> None:
    listing = run("ls", root).stdout
    assert "3 committed checkpoints, 3 not; " in listing
    assert "3 other names (--all shows them)" in listing
    assert f"'lastgood doctor {root}' explains" in listing


def test_the_document_holds_the_exact_values(root: Path) -> None:
    document = run_json("ls", root)
    first = document["steps"][0]
    file = root / "step-10" / "checkpoint_0.pt"
    expected = {
        "step": 10,
        "path": str(root / "step-10"),
        "condition": "committed",
        "nbytes": file.stat().st_size,
        "saved_at": 1.7e9,
        "metrics": {"loss": 1 / 11},
        "world_size": 1,
        "durable_secs": 0.84,
        "problem": None,
    }
    assert expected.items() <= first.items()
    assert len(first["save_id"]) == 32
    assert document["steps"][2]["nbytes"] == (root / "step-30" / "checkpoint_0.pt").stat().st_size
    assert document["nbytes"] == sum(row["nbytes"] for row in document["steps"])
    assert document["set_aside"] == ["step-50.set-aside"]
    assert document["others"] == ["step-007", "step-10.backup", "step-5"]


def test_looking_changes_nothing(root: Path) -> None:
    before = tree(root)
    for words in (("ls", root), ("ls", "--all", "--json", root), ("ls", root / "step-200")):
        run(*words)
    assert tree(root) == before


@pytest.mark.parametrize("name", ["step-10", "step-10.backup", "step-10/checkpoint_0.pt", "step-50.set-aside/"])
def test_a_checkpoint_that_is_named_itself_is_one_row(root: Path, name: str) -> None:
    (row,) = run_json("ls", f"{root}/{name}")["steps"]
    assert (row["step"], row["condition"], row["world_size"], row["metrics"]) == (10, "committed", 1, {"loss": 1 / 11})
    assert len(run("ls", f"{root}/{name}").stdout.splitlines()) == 3


def test_the_file_of_one_of_several_ranks_is_no_checkpoint(root: Path) -> None:
    (row,) = run_json("ls", root / "step-200" / "checkpoint_1.pt")["steps"]
    assert (row["condition"], row["world_size"]) == ("unfinished", 2)
    assert "rank 1's part of a checkpoint of 2 ranks" in run("ls", root / "step-200" / "checkpoint_1.pt").stdout


def test_the_directory_of_one_unfinished_step_says_why(root: Path) -> None:
    done = run("ls", root / "step-300")
    assert done.returncode == 0
    assert "no file of it is there" in done.stdout


def test_a_plain_torch_file_is_a_row_too(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "plain.pt")
    (row,) = run_json("ls", tmp_path / "plain.pt")["steps"]
    assert (row["step"], row["condition"]) == (None, "foreign")
    assert row["nbytes"] == (tmp_path / "plain.pt").stat().st_size
    assert "plain.pt  foreign" in run("ls", tmp_path / "plain.pt").stdout


def test_metrics_that_were_not_finite_are_marked(tmp_path: Path) -> None:
    lastgood.make_sync_checkpointer().save(str(tmp_path / "step-1"), {"a": 1}, metrics={"loss": float("nan")})
    assert "loss=?" in run("ls", tmp_path).stdout
    assert run_json("ls", tmp_path)["steps"][0]["metrics"] == {"loss": None}


def test_independent_ranks_count_together(tmp_path: Path) -> None:
    for rank in range(3):
        save(tmp_path / "step-7", 1, rank, world_size=3)
    (row,) = run_json("ls", tmp_path)["steps"]
    assert (row["condition"], row["world_size"]) == ("committed", 3)
    assert row["nbytes"] == sum(file.stat().st_size for file in (tmp_path / "step-7").iterdir())


def test_a_save_without_a_manifest_is_unfinished(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "step-7", 1) == [None, None]
    (tmp_path / "step-7" / MANIFEST_NAME).unlink()
    (row,) = run_json("ls", tmp_path)["steps"]
    assert row["condition"] == "unfinished"
    assert row["latest"] is False


def test_a_log_that_cannot_be_read_costs_its_column_only(tmp_path: Path) -> None:
    save_steps(tmp_path, [10])
    (tmp_path / "lastgood.jsonl").mkdir()
    assert run_json("ls", tmp_path)["steps"][0]["durable_secs"] is None


def test_nothing_there_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    assert_one_line_of_error(run("ls", tmp_path), 2, str(tmp_path), "it is empty")
    (tmp_path / "step-007").mkdir()
    assert_one_line_of_error(run("ls", tmp_path), 2, "none of the 1 names in it")
    assert_one_line_of_error(run("ls", tmp_path / "other"), 2, "there is no directory")


def test_only_what_was_set_aside_is_something(tmp_path: Path) -> None:
    (tmp_path / "step-5.set-aside").mkdir()
    done = run("ls", tmp_path)
    assert done.returncode == 0
    assert "set aside: step-5.set-aside" in done.stdout


def test_ages_are_counted_from_now(tmp_path: Path) -> None:
    save_steps(tmp_path, [1], saved_at=time.time() - 5 * 86400)
    assert "5 days ago" in run("ls", tmp_path).stdout


def test_many_tensors_are_not_described_to_list_a_step(tmp_path: Path, rng_seed: int) -> None:
    # The bytes read bound the time: the index of the file, and nothing of 20,000 tensors' data.
    generator = torch.Generator().manual_seed(rng_seed)
    state = {f"block{number}.weight": torch.rand(64, generator=generator) for number in range(20_000)}
    lastgood.make_sync_checkpointer().save(str(tmp_path / "step-1"), state, step=1)
    program = """
import os, sys
from lastgood.storage.file_ops import OsFileOps
read, original = [0], OsFileOps.pread_into
def counting(self, descriptor, target, offset):
    count = original(self, descriptor, target, offset)
    read[0] += count
    return count
OsFileOps.pread_into = counting
from lastgood.cli import main
try:
    main()
finally:
    print(read[0], file=sys.stderr)
"""
    done = run("ls", tmp_path, program=program)
    size = (tmp_path / "step-1" / "checkpoint_0.pt").stat().st_size
    assert done.returncode == 0
    assert 0 < int(done.stderr) < size - 20_000 * 64 * 4
