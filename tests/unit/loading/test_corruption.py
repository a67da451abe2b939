"""Damage of every kind: found, named, and never returned as data."""

import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.loading.files import archive_of, flip, raw, verify

import lastgood
from lastgood.errors import CorruptCheckpointError, UnsafeCheckpointError
from lastgood.format.image import data_descriptor

MEBIBYTE = 1024 * 1024


def small_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model": {"weight": torch.rand(4, 3, generator=generator), "bias": torch.rand(5, generator=generator)},
        "step": 17,
        "note": "text",
    }


def large_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(8)
    return {
        "first": torch.rand(700_000, generator=generator),
        "small": torch.rand(10, generator=generator),
        "second": torch.rand(900_000, generator=generator),
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.pt"
    lastgood.save(small_state(), file)
    return file


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "large.pt"
    lastgood.save(large_state(), file)
    return file


def records_of(file: Path) -> dict[str, tuple[int, int]]:
    """Where the data of each record begins and ends."""
    with archive_of(file) as archive:
        return {record.name: (record.data_offset, record.data_end) for record in archive.layout.records}


def refused(file: Path) -> CorruptCheckpointError | UnsafeCheckpointError:
    """The error of a whole load, having made sure that verification finds the damage too."""
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)) as caught:
        lastgood.load(file)
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)):
        verify(file)
    error = caught.value
    assert str(file) in str(error)
    assert error.path == str(file)
    return error


# Flipped bits


def test_hazard_20_every_single_flipped_byte_is_found(small: Path) -> None:
    """Nine libraries load a flipped bit as a changed weight."""
    verify(small)
    tensors = {"archive/data/0": "model.weight", "archive/data/1": "model.bias"}
    records = records_of(small)
    size = small.stat().st_size
    assert size < 4096
    named = 0
    for offset in range(size):
        mask = 0xFF if offset % 2 else 1 << offset % 8
        flip(small, offset, mask)
        error = refused(small)
        for name, tensor in tensors.items():
            start, end = records[name]
            if start <= offset < end:
                assert error.tensor == tensor
                assert repr(tensor) in str(error)
                named += 1
        flip(small, offset, mask)
    assert named == 4 * (12 + 5)
    verify(small)


def test_a_flip_right_behind_the_trailer_is_found_where_little_is_read(small: Path) -> None:
    """What says whether the ending can be believed is looked at before any data is, in partial loads too."""
    with archive_of(small) as archive:
        end = archive.layout.trailer.data_end
        behind = len(data_descriptor(archive.layout.trailer, 0))
    assert behind >= 16
    for offset in range(end, end + behind):
        flip(small, offset, 1)
        with pytest.raises(CorruptCheckpointError, match="its trailer does not match its checksum"):
            lastgood.load(small, {"step": None})
        flip(small, offset, 1)
    assert lastgood.load(small, {"step": None}) == {"step": 17}


def test_flips_in_a_file_with_values_that_only_the_pickle_describes(tmp_path: Path, rng_seed: int) -> None:
    file = tmp_path / "state.pt"
    lastgood.save({"sparse": torch.eye(2).to_sparse(), "weight": torch.ones(3)}, file)
    chance = random.Random(rng_seed)
    pickled = range(*records_of(file)["archive/data.pkl"])
    for offset in [*pickled[::5], *(chance.randrange(file.stat().st_size) for _ in range(150))]:
        mask = 1 << chance.randrange(8)
        flip(file, offset, mask)
        refused(file)
        flip(file, offset, mask)
    verify(file)


def test_sampled_flips_in_a_file_of_many_blocks(large: Path, rng_seed: int) -> None:
    chance = random.Random(rng_seed)
    records = records_of(large)
    size = large.stat().st_size
    offsets = {0, 1, size - 1, size - 22, size - 98, 40}
    for start, end in records.values():
        # The header before, the first and last byte, block boundaries, the descriptor after.
        offsets |= {max(start - 1, 0), start, end - 1, end, end + 5, end + 15}
        offsets |= {at for at in (start + MEBIBYTE - 1, start + MEBIBYTE, start + 2 * MEBIBYTE) if at < end}
    for name in ("archive/.lastgood/blocks.crc32", "archive/.lastgood/trailer"):
        offsets |= set(range(*records[name]))
    offsets |= {chance.randrange(size) for _ in range(10)}
    directory = records["archive/.lastgood/trailer"][1] + 16
    offsets |= {chance.randrange(directory, size) for _ in range(20)}
    for offset in sorted(offsets):
        mask = 1 << chance.randrange(8)
        flip(large, offset, mask)
        error = refused(large)
        for number, tensor in enumerate(large_state()):
            start, end = records[f"archive/data/{number}"]
            if start <= offset < end:
                assert error.tensor == tensor, offset
        flip(large, offset, mask)
    verify(large)


def test_the_first_damaged_tensor_is_named(large: Path) -> None:
    records = records_of(large)
    flip(large, records["archive/data/2"][0] + 5)
    flip(large, records["archive/data/0"][1] - 5)
    assert refused(large).tensor == "first"


def test_an_error_says_where_and_what_to_do(large: Path) -> None:
    start, _ = records_of(large)["archive/data/2"]
    flip(large, start + MEBIBYTE + 3)
    message = str(refused(large))
    assert f"between the bytes {start + MEBIBYTE} and {start + 2 * MEBIBYTE}" in message
    assert "load an earlier checkpoint" in message


# Partial loads and targets


def test_a_partial_load_finds_damage_in_what_it_needs_and_only_there(large: Path) -> None:
    records = records_of(large)
    flip(large, records["archive/data/2"][0] + 100)
    made = lastgood.load(large, {"first": None, "small": torch.zeros(10)})
    assert torch.equal(made["first"], large_state()["first"])
    assert torch.equal(made["small"], large_state()["small"])
    with pytest.raises(CorruptCheckpointError) as caught:
        lastgood.load(large, {"second": None})
    assert caught.value.tensor == "second"
    assert caught.value.undefined_targets == ()


@pytest.mark.parametrize("transposed", [False, True], ids=["direct", "staged"])
def test_targets_are_listed_as_undefined(tmp_path: Path, transposed: bool) -> None:
    file = tmp_path / "state.pt"
    lastgood.save({"a": torch.rand(1000, 500), "b": {"c": torch.rand(1000, 500)}}, file)
    flip(file, records_of(file)["archive/data/1"][1] - 1)
    tensor = torch.zeros(500, 1000).t() if transposed else torch.zeros(1000, 500)
    with pytest.raises(CorruptCheckpointError) as caught:
        lastgood.load(file, {"a": torch.zeros(1000, 500), "b": {"c": tensor}})
    assert caught.value.tensor == "b.c"
    assert caught.value.undefined_targets == ("a", "b.c")
    assert "must be loaded again" in str(caught.value)


def test_verify_first_touches_nothing_when_there_is_damage_anywhere(large: Path) -> None:
    good = torch.zeros(700_000)
    target: dict[str, Any] = {"first": good, "small": None}
    flip(large, records_of(large)["archive/data/2"][1] - 1)
    with pytest.raises(CorruptCheckpointError) as caught:
        lastgood.load(large, target, verify_first=True)
    assert caught.value.tensor == "second"
    assert caught.value.undefined_targets == ()
    assert raw(good) == bytes(4 * 700_000)
    assert good._version == 0
    assert target["small"] is None
    # Without it the same load succeeds: the damage lies elsewhere.
    assert torch.equal(lastgood.load(large, target)["first"], large_state()["first"])


def test_verify_first_loads_what_is_whole(large: Path) -> None:
    loaded = lastgood.load(large, {"first": torch.zeros(700_000)}, verify_first=True)
    assert torch.equal(loaded["first"], large_state()["first"])


def test_without_verification_the_data_comes_as_it_is(large: Path) -> None:
    flip(large, records_of(large)["archive/data/1"][0])
    loaded = lastgood.load(large, verify=False)
    assert torch.equal(loaded["first"], large_state()["first"])
    assert not torch.equal(loaded["small"], large_state()["small"])
    assert torch.equal(loaded["small"][1:], large_state()["small"][1:])


# Files of another length


def boundaries(file: Path) -> list[int]:
    """Every place where something in the file begins or ends."""
    ends = {0, 1, 4, 30}
    for start, end in records_of(file).values():
        ends |= {start - 1, start, end - 1, end, end + 16}
    size = file.stat().st_size
    return sorted(ends | {size - distance for distance in (1, 22, 42, 98, 99)})


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_truncated_file_is_refused_wherever_it_ends(name: str, request: pytest.FixtureRequest, rng_seed: int) -> None:
    file: Path = request.getfixturevalue(name)
    whole = file.read_bytes()
    chance = random.Random(rng_seed)
    lengths = {*boundaries(file), *(chance.randrange(len(whole)) for _ in range(60))}
    for length in sorted(length for length in lengths if length < len(whole)):
        file.write_bytes(whole[:length])
        refused(file)
        with pytest.raises(CorruptCheckpointError):
            lastgood.load(file, {"small": None})


def test_appended_bytes_are_refused(small: Path) -> None:
    whole = small.read_bytes()
    for garbage in (b"\0", b"\n", bytes(22), bytes(100_000), whole, whole[-98:], b"PK\x05\x06" + bytes(18)):
        small.write_bytes(whole + garbage)
        refused(small)
    for garbage in (b"\0", bytes(4096), whole[:300]):
        small.write_bytes(garbage + whole)
        refused(small)


def test_a_hole_of_zeros_is_refused(large: Path) -> None:
    """What a crash leaves behind of blocks that were allocated and never written."""
    whole = large.read_bytes()
    for start in range(0, len(whole), 1_000_000):
        end = min(start + 65_536, len(whole))
        large.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
        refused(large)


def test_hazard_18a_a_valid_zip_with_records_missing(large: Path) -> None:
    """torch.save interrupted by a signal closes a zip that reads well and lacks tensors."""
    with zipfile.ZipFile(large) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for dropped in ("archive/data/2", "archive/.lastgood/index.json", "archive/.lastgood/trailer"):
        with zipfile.ZipFile(large, "w") as archive:
            for name, data in records:
                if name != dropped:
                    archive.writestr(name, data)
        refused(large)
        with pytest.raises(CorruptCheckpointError):
            lastgood.load(large, {"small": None})


def test_hazard_18a_in_a_file_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "torch.pt"
    torch.save(large_state(), file)
    with zipfile.ZipFile(file) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for count in range(1, len(records)):
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in records[:count]:
                archive.writestr(name, data)
        if all("torch/" + name in dict(records[:count]) for name in ("data.pkl", "data/0", "data/1", "data/2")):
            continue
        with pytest.raises(CorruptCheckpointError):
            lastgood.load(file, {"small": None})


def test_two_files_stuck_together_from_different_saves_are_refused(tmp_path: Path) -> None:
    """Same layout, same size: only checksums and the save id tell them apart."""
    one, other, mixed = (tmp_path / name for name in ("one", "other", "mixed"))
    lastgood.save({"w": torch.zeros(300_000)}, one)
    lastgood.save({"w": torch.ones(300_000)}, other)
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second)
    start, end = records_of(one)["archive/data/0"]
    for cut in (start, start + 4, (start + end) // 2, end, end + 100, len(first) - 300, len(first) - 200):
        stuck = first[:cut] + second[cut:]
        if stuck not in (first, second):
            mixed.write_bytes(stuck)
            refused(mixed)


def test_a_changed_plain_value_is_found_by_a_load_of_any_key(small: Path) -> None:
    """Which reads nothing but what that key needs."""
    whole, records = small.read_bytes(), records_of(small)
    [index] = [whole[slice(*span)] for name, span in records.items() if name.endswith("index.json")]
    assert index.count(b'"step":17') == 1
    small.write_bytes(whole.replace(index, index.replace(b'"step":17', b'"step":71')))
    for key, value in (("step", 0), ("note", "")):
        with pytest.raises(CorruptCheckpointError, match=r"index\.json does not match its checksum"):
            lastgood.load(small, {key: value})


def test_a_changed_checksum_is_told_from_a_damaged_tensor(small: Path) -> None:
    with archive_of(small) as archive:
        table = archive.layout.blocks.data_offset
    flip(small, table)
    with pytest.raises(CorruptCheckpointError, match="table of block checksums does not match its own checksum"):
        lastgood.load(small, {"model": {"bias": None}})


# Files of torch's


def test_every_flipped_byte_in_a_torch_file_is_found_or_harmless(tmp_path: Path) -> None:
    """Their zips have checksums for the records alone: a flip elsewhere may pass, but never as other data."""
    file = tmp_path / "torch.pt"
    state = {"w": torch.arange(10.0), "n": 3}
    torch.save(state, file)
    found = 0
    for offset in range(file.stat().st_size):
        flip(file, offset)
        try:
            loaded = lastgood.load(file)
        except (CorruptCheckpointError, UnsafeCheckpointError):
            found += 1
        else:
            assert torch.equal(loaded["w"], state["w"])
            assert loaded["n"] == 3
        flip(file, offset)
    assert found > 40 + 162  # all data, all of the pickle, and more


def test_hazard_20_truncated_torch_files(tmp_path: Path, rng_seed: int) -> None:
    """Two libraries load truncated files silently wrong."""
    for name, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        file = tmp_path / name
        torch.save({"w": torch.arange(5000.0), "v": torch.ones(7)}, file, **options)
        whole = file.read_bytes()
        chance = random.Random(rng_seed)
        lengths = {0, 1, 2, 3, 4, 22, 100, len(whole) - 1, len(whole) - 22}
        for length in sorted(lengths | {chance.randrange(len(whole)) for _ in range(40)}):
            file.write_bytes(whole[:length])
            for target in (None, {"v": None}):
                with pytest.raises(CorruptCheckpointError):
                    lastgood.load(file, target)
