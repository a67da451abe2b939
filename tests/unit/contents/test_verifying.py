"""Verifying without torch: whatever byte is wrong is found, and all damaged tensors are named."""

import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers.saves import commit_together, save, state_of
from tests.unit.contents.samples import every_kind, save_in_each_form
from tests.unit.loading.files import FORGED_TENSOR, archive_of, flip, forge

import lastgood
from lastgood import _events
from lastgood._contents import VerifyReport, verify_checkpoint
from lastgood.errors import CheckpointNotFoundError

MEBIBYTE = 1024 * 1024


def verified(path: Path) -> VerifyReport:
    return verify_checkpoint(str(path))


def messages(path: Path) -> str:
    report = verified(path)
    assert not report.is_good
    return "\n".join(f"{problem.file}: {problem.message}" for problem in report.problems)


# One file


def test_whole_files_of_each_format_are_good(tmp_path: Path) -> None:
    for kind, path in save_in_each_form(tmp_path, every_kind()).items():
        report = verified(path)
        assert (report.is_good, report.files, report.nbytes) == (True, 1, path.stat().st_size)
        # What has no checksums cannot be verified, and that is said.
        assert [("no checksums" in note) for note in report.notes] == [True] * (kind == "torch legacy")


def test_any_flipped_byte_of_ours_is_found(tmp_path: Path, rng_seed: int) -> None:
    path = tmp_path / "file.pt"
    warnings.simplefilter("ignore")
    lastgood.save(every_kind(), path)
    size = path.stat().st_size
    positions = [*random.Random(rng_seed).sample(range(size), 300), 0, size - 1]
    for position in positions:
        flip(path, position)
        assert not verified(path).is_good, position
        flip(path, position)
    assert verified(path).is_good


def test_every_damaged_tensor_is_named_large_ones_and_small_ones(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    state = {"large": torch.ones(3 * MEBIBYTE // 4), "small": {f"s{number}": torch.ones(20) for number in range(50)}}
    lastgood.save({"w": state, "other": torch.ones(7)}, path)
    with archive_of(path) as archive:
        records = archive.layout.storages
        expected = {"w.large", "w.small.s3", "w.small.s4", "w.small.s49"}
        flip(path, records[0].data_offset + 5)
        flip(path, records[0].data_offset + 2 * MEBIBYTE + 5)
        for number in (3, 4, 49):
            flip(path, records[1 + number].data_offset + 2)
    report = verified(path)
    assert {problem.tensor for problem in report.problems} == expected
    large = next(problem for problem in report.problems if problem.tensor == "w.large")
    assert "1 more" in large.message
    assert all(problem.file == str(path) for problem in report.problems)


def test_an_index_that_says_other_than_the_pickle_is_found(tmp_path: Path) -> None:
    node, storages = FORGED_TENSOR
    good = forge(tmp_path / "good.pt", node, storages)
    assert verified(good).is_good
    forged = forge(tmp_path / "forged.pt", node, storages, pickled=b"\x80\x02}.")
    assert "describe different states" in messages(forged)


def test_a_cut_file_is_found(tmp_path: Path) -> None:
    for path in save_in_each_form(tmp_path, every_kind()).values():
        os.truncate(path, path.stat().st_size - 1)
        assert not verified(path).is_good


def test_any_flipped_byte_of_tensor_data_in_torchs_zip_is_found_and_named(tmp_path: Path, rng_seed: int) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({f"w{number}": torch.randn(500) for number in range(10)}, path)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    data = path.read_bytes()
    for number in random.Random(rng_seed).sample(range(10), 3):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(infos[number])
        flip(path, data.index(content) + 17)
        (problem,) = verified(path).problems
        assert problem.tensor == f"w{number}"
        flip(path, data.index(content) + 17)


def test_a_valid_zip_with_records_missing_is_found(tmp_path: Path) -> None:
    # What a torch.save leaves that a signal interrupted in the middle.
    path = tmp_path / "theirs.pt"
    torch.save({"a": torch.ones(3), "b": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        kept = [(info.filename, archive.read(info)) for info in archive.infolist() if not info.filename.endswith("/1")]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept:
            archive.writestr(name, content)
    assert "does not hold" in messages(path)


def test_a_pickle_that_torch_would_not_load_is_no_damage_and_said(tmp_path: Path) -> None:
    path = tmp_path / "protocol 4.pt"
    torch.save({"a": torch.ones(3)}, path, pickle_protocol=4)
    report = verified(path)
    assert report.is_good
    assert "protocol 4" in report.notes[0]


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    lastgood.save({"w": torch.ones(5 * MEBIBYTE)}, path)
    seen: list[_events.Progress] = []
    stop = _events.subscribe_to_progress(seen.append)
    try:
        verified(path)
    finally:
        stop()
    assert max(progress.done for progress in seen) == seen[0].total == path.stat().st_size


# A directory


def rename_rank(path: Path) -> None:
    shutil.copy(path / "checkpoint_0.pt", path / "checkpoint_1.pt")


def flip_in(name: str, position: int) -> Callable[[Path], None]:
    return lambda path: flip(path / name, position)


def replace_by_torchs(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path / "checkpoint_1.pt")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte": (flip_in("checkpoint_1.pt", 5000), "checkpoint_1.pt"),
    "a flipped byte in the manifest": (flip_in("manifest.json", 30), "manifest.json"),
    "a file removed": (lambda path: os.unlink(path / "checkpoint_1.pt"), "not there"),
    "the manifest removed": (lambda path: os.unlink(path / "manifest.json"), "no manifest commits it"),
    "a file renamed": (rename_rank, "somebody renamed it"),
    "a file of torch's": (replace_by_torchs, "lastgood did not write this one"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_a_checkpoint_of_several_ranks_is_found(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "c"
    assert commit_together(path, 1) == [None, None]
    assert verified(path) == VerifyReport(str(path), 2, sum(f.stat().st_size for f in path.glob("*.pt")))
    damage(path)
    assert said in messages(path)


def test_files_of_two_saves_are_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert commit_together(tmp_path / name, 1) == [None, None]
    shutil.copy(tmp_path / "b" / "checkpoint_1.pt", tmp_path / "a" / "checkpoint_1.pt")
    assert "another save" in messages(tmp_path / "a")


def test_independent_files_are_good_when_all_are_there(tmp_path: Path) -> None:
    for rank in range(2):
        save(tmp_path, rank, rank, 2)
    assert verified(tmp_path).is_good
    os.unlink(tmp_path / "checkpoint_1.pt")
    assert "not there" in messages(tmp_path)


def test_a_directory_of_torchs_files_is_verified(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(state_of(rank), tmp_path / f"checkpoint_{rank}.pt")
    assert verified(tmp_path).files == 2
    assert verified(tmp_path).is_good


def test_nothing_there_is_no_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verified(tmp_path / "missing")
