"""Telling whose a file is, without reading all that is in it."""

import random
from pathlib import Path

import pytest
import torch
from tests.helpers.saves import save, state_of
from tests.storage.recording import RecordingFileOps

from lastgood.errors import CorruptCheckpointError
from lastgood.format.archive import open_archive
from lastgood.format.identity import FileIdentity, read_identity
from lastgood.format.image import END_SIZE
from lastgood.format.spec import FORMAT_VERSION, crc32
from lastgood.storage.local import LocalStorage


def identity_of(file: Path) -> FileIdentity | None:
    stored = LocalStorage().open(str(file))
    try:
        return read_identity(stored)
    finally:
        stored.close()


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3)])
def test_it_is_that_of_the_whole_archive(tmp_path: Path, rank: int, world_size: int) -> None:
    save(tmp_path, 1, rank, world_size)
    file = tmp_path / f"checkpoint_{rank}.pt"
    archive = open_archive(LocalStorage().open(str(file)))
    assert archive is not None
    assert identity_of(file) == FileIdentity(
        archive.index.save_id, rank, world_size, world_size > 1, file.stat().st_size, crc32(archive.trailer_bytes)
    )


def test_it_reads_a_small_part_of_a_large_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    ops = RecordingFileOps()
    read_identity(LocalStorage(ops).open(str(tmp_path / "checkpoint_0.pt")))
    assert sum(len(call.arguments[1]) for call in ops.of("pread_into")) < 8192


def test_files_of_others_have_none(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save(state_of(1), foreign)
    assert identity_of(foreign) is None
    for size in (0, 1, END_SIZE, 100_000):
        foreign.write_bytes(random.Random(size).randbytes(size))
        assert identity_of(foreign) is None


def test_a_damaged_index_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoint_0.pt"
    whole = file.read_bytes()
    start = whole.index(b'{"format_version"')
    for position in (start, start + 30, start + 60):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CorruptCheckpointError, match=r"index\.json does not match its checksum") as caught:
            identity_of(file)
        assert caught.value.path == str(file)


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoint_0.pt"
    data = bytearray(file.read_bytes())
    version = data.rindex(b"LASTGOOD") + len(b"LASTGOOD")
    data[version] += 1
    file.write_bytes(data)
    with pytest.raises(
        CorruptCheckpointError, match=f"asks for format version {FORMAT_VERSION + 1}, this lastgood reads up to"
    ):
        identity_of(file)


def test_an_index_beyond_the_end_is_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoint_0.pt"
    data = bytearray(file.read_bytes())
    size_of_index = data.rindex(b"LASTGOOD") + 8 + 4 * 4 + 8
    data[size_of_index + 5] = 1  # 1 TiB more
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="places the index where it cannot be"):
        identity_of(file)


def test_any_flipped_bit_in_the_ending_gives_the_truth_or_an_error(tmp_path: Path, rng_seed: int) -> None:
    """A changed identity must not pass: it could let a file of another save into a checkpoint."""
    save(tmp_path, 1)
    file = tmp_path / "checkpoint_0.pt"
    whole = file.read_bytes()
    truth = identity_of(file)
    assert truth is not None
    chance = random.Random(rng_seed)
    start = whole.index(b'{"format_version"')
    for position in chance.sample(range(start, len(whole)), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            found = identity_of(file)
        except CorruptCheckpointError:
            continue
        # The CRC of the trailer is what the manifest remembers.
        assert found is None or found.trailer_crc != truth.trailer_crc or found == truth
