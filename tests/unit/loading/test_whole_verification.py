"""Verifying all of a file while only a part of it is loaded."""

from pathlib import Path

import pytest
import torch
from tests.unit.loading.files import CountingFile, flip, opened

import lastgood
from lastgood import make_sync_checkpointer
from lastgood._loading.file import load_file
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import CorruptCheckpointError
from lastgood.types import RankInfo


def test_a_whole_verification_finds_damage_that_the_target_does_not_ask_for(tmp_path: Path) -> None:
    state = {"wanted": torch.rand(300_000), "other": torch.rand(300_000), "small": torch.rand(4), "step": 3}
    make_sync_checkpointer().save(str(tmp_path), state)
    file = tmp_path / "checkpoint_0.pt"
    whole = file.read_bytes()
    reader = CheckpointReader(RankInfo(0, 1))
    for offset in sorted({*range(0, len(whole), len(whole) // 150), 0, 40, len(whole) - 1}):
        flip(file, offset)
        with pytest.raises(CorruptCheckpointError):
            reader.read(str(tmp_path), {"wanted": torch.empty(300_000)}, verify_whole=True)
        file.write_bytes(whole)
    target = {"wanted": torch.empty(300_000)}
    reader.read(str(tmp_path), target, verify_whole=True)
    assert torch.equal(target["wanted"], state["wanted"])


def test_a_whole_verification_reads_large_tensors_once(tmp_path: Path) -> None:
    lastgood.save({"wanted": torch.rand(1_000_000), "other": torch.rand(1_000_000)}, tmp_path / "file.pt")
    with opened(tmp_path / "file.pt") as file:
        counting = CountingFile(file)
        load_file(counting, {"wanted": torch.empty(1_000_000)}, verify_whole=True)
        size = file.size
    assert size <= counting.bytes_read < size + 200_000
