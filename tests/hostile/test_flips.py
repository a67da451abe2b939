"""Single flipped bits and missing ends: each one found, and the tensor named that it lies in."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hostile.samples import Sample, write
from tests.hostile.zip_fields import records_of
from tests.unit.loading.files import archive_of, flip

import lastgood
from lastgood._contents import Problem, verify_checkpoint
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import CorruptCheckpointError
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

pytestmark = pytest.mark.long

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]

FLIPPED = "flipped bits"
CUT = "truncated files"
MEBIBYTE = 1024 * 1024
TENSORS = {
    "single": {"0": "model.w", "1": "model.b"},
    "spread": {"0": "w", "1": "both", "2": "own"},
}
"""Which tensors stand in which storage records."""


def problems(sample: Sample) -> tuple[Problem, ...]:
    return verify_checkpoint(str(sample.directory), LocalStorage()).problems


def load(sample: Sample, name: str) -> Any:
    """Everything, by ranks that together read every byte of this file."""
    directory = str(sample.directory)
    if sample.ranks == 1:
        return CheckpointReader(RankInfo(0, 1)).read(directory)
    # One rank alone reads, and checks, the files of all that saved.
    return CheckpointReader(RankInfo(0, 1)).read(directory, verify_whole=True, per_rank={"own": "first"})


def tensor_at(sample: Sample, name: str, kind: str, offset: int) -> str | None:
    """The key of the tensor whose data this byte is, if it is one's."""
    if not name.endswith(".pt"):
        return None
    for record in records_of(sample.whole[name]):
        if record.name in TENSORS[kind] and record.data_offset <= offset < record.data_end:
            return TENSORS[kind][record.name]
    return None


def check_flip(sample: Sample, kind: str, name: str, offset: int, bit: int, *, load_too: bool) -> None:
    """One flipped bit is found by ``verify``, and by a load of everything, with the tensor that it lies in."""
    tensor = tensor_at(sample, name, kind, offset)
    whole = sample.whole[name]
    write(sample, name, whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
    found = problems(sample)
    assert found, (name, offset, bit)
    assert all(problem.file.startswith(str(sample.directory)) for problem in found), found
    if tensor is not None:
        assert (found[0].tensor, found[0].file) == (tensor, str(sample.directory / name)), (offset, bit, found)
        assert repr(tensor) in found[0].message
    if load_too:
        with pytest.raises(CorruptCheckpointError) as caught:
            load(sample, name)
        assert str(sample.directory) in str(caught.value)
        assert tensor is None or caught.value.tensor == tensor, (offset, bit, caught.value)
    write(sample, name, whole)


def test_the_flips_below_are_made_in_whole_checkpoints(sample: GetSample) -> None:
    for kind in ("single", "spread"):
        found = sample(kind)
        assert problems(found) == ()
        for name in found.whole:
            load(found, name)
        assert {tensor_at(found, "checkpoint_0.pt", kind, at) for at in range(len(found.whole["checkpoint_0.pt"]))} == {
            None,
            *(TENSORS[kind].values()),
        }


def check_flips(sample: Sample, kind: str, name: str, places: range, chance: random.Random, *, load_too: bool) -> None:
    """One bit, drawn by ``chance``, at each of these places of a file."""
    for offset in places:
        check_flip(sample, kind, name, offset, chance.randrange(8), load_too=load_too)


def test_verify_finds_a_flipped_bit_in_every_byte_of_a_file(
    sample: GetSample, count_cases: CountCases, rng_seed: int
) -> None:
    """That a load finds it, too, is shown with the other damage that loads find."""
    places = range(len(sample("single").whole["checkpoint_0.pt"]))
    check_flips(sample("single"), "single", "checkpoint_0.pt", places, random.Random(rng_seed), load_too=False)
    count_cases(FLIPPED, len(places))


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(
    sample: GetSample, count_cases: CountCases, rng_seed: int
) -> None:
    places = range(len(sample("spread").whole["manifest.json"]))
    check_flips(sample("spread"), "spread", "manifest.json", places, random.Random(rng_seed), load_too=True)
    count_cases(FLIPPED, len(places))


def test_a_flipped_bit_in_a_file_of_several_ranks_is_found_by_any_other_number_of_them(
    sample: GetSample, count_cases: CountCases, rng_seed: int
) -> None:
    chance, found = random.Random(rng_seed), sample("spread")
    for name in ("checkpoint_0.pt", "checkpoint_1.pt"):
        places = range(chance.randrange(16), len(found.whole[name]), 16)
        check_flips(found, "spread", name, places, chance, load_too=True)
        count_cases(FLIPPED, len(places))


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_every_bit_of_a_small_checkpoint(sample: GetSample, count_cases: CountCases) -> None:
    found = sample("single")
    size = len(found.whole["checkpoint_0.pt"])
    for place in range(8 * size):
        check_flip(found, "single", "checkpoint_0.pt", place // 8, place % 8, load_too=True)
    count_cases(FLIPPED, 8 * size)


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_every_byte_of_the_checkpoint_of_two_ranks(sample: GetSample, count_cases: CountCases, rng_seed: int) -> None:
    """Every bit of its manifest, and one of each byte of its files."""
    chance, found = random.Random(rng_seed), sample("spread")
    for name, whole in found.whole.items():
        for offset in range(len(whole)):
            bits = range(8) if name == "manifest.json" else [chance.randrange(8)]
            for bit in bits:
                check_flip(found, "spread", name, offset, bit, load_too=True)
            count_cases(FLIPPED, len(bits))


def test_a_file_that_ends_anywhere_is_no_whole_one(sample: GetSample, count_cases: CountCases, rng_seed: int) -> None:
    """Every third place in one run, all of them in three (and in every run of the longer tests)."""
    first = random.Random(rng_seed).randrange(3)
    check_truncations(sample("single"), "checkpoint_0.pt", count_cases, slice(first, None, 3), load_too=False)


def check_truncations(sample: Sample, name: str, count_cases: CountCases, which: slice, *, load_too: bool) -> None:
    """The beginnings of a file, of these lengths, are refused."""
    whole = sample.whole[name]
    lengths = range(len(whole))[which]
    for length in lengths:
        write(sample, name, whole[:length])
        assert problems(sample), length
        if load_too:
            with pytest.raises(CorruptCheckpointError):
                load(sample, name)
    count_cases(CUT, len(lengths))


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_every_beginning_of_every_file_is_refused_by_loads_too(sample: GetSample, count_cases: CountCases) -> None:
    for kind in ("single", "spread"):
        found = sample(kind)
        for name in found.whole:
            check_truncations(found, name, count_cases, slice(None), load_too=True)
            write(found, name, found.whole[name])


# Large files


def large_file(path: Path, tensors: int, nbytes: int) -> Path:
    """A file of so many tensors of so many bytes each."""
    generator = torch.Generator().manual_seed(3)
    shape = (nbytes // 4,)
    lastgood.save({f"t{number}": torch.rand(shape, generator=generator) for number in range(tensors)}, path)
    return path


def rounds(path: Path, chance: random.Random, count: int) -> Iterator[dict[str, int]]:
    """For each round, a bit in each tensor; together so many. Each is flipped while the test looks at the round."""
    with archive_of(path) as archive:
        records = {f"t{number}": record for number, record in enumerate(archive.layout.storages)}
    for _ in range(math.ceil(count / len(records))):
        bits = {key: 8 * record.data_offset + chance.randrange(8 * record.size) for key, record in records.items()}
        for bit in bits.values():
            flip(path, bit // 8, 1 << bit % 8)
        yield bits
        for bit in bits.values():
            flip(path, bit // 8, 1 << bit % 8)


def check_large(path: Path, chance: random.Random, count: int) -> int:
    """``verify`` names every tensor that has a flipped bit, and a load of any of them fails; returns how many bits."""
    flipped = 0
    for bits in rounds(path, chance, count):
        found = verify_checkpoint(str(path)).problems
        assert {problem.tensor for problem in found} == set(bits), (bits, found)
        assert len(found) == len(bits)
        for key, bit in bits.items():
            with pytest.raises(CorruptCheckpointError) as caught:
                lastgood.load(path, {key: None})
            assert caught.value.tensor == key, bit
        with pytest.raises(CorruptCheckpointError) as caught:
            lastgood.load(path)
        assert caught.value.tensor in bits
        flipped += len(bits)
    assert verify_checkpoint(str(path)).is_good
    return flipped


def test_sampled_bits_of_a_file_of_four_mebibytes(tmp_path: Path, count_cases: CountCases, rng_seed: int) -> None:
    path = large_file(tmp_path / "large.pt", 40, MEBIBYTE // 10)
    count_cases(FLIPPED, check_large(path, random.Random(rng_seed), 1000))


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_ten_thousand_bits_of_a_file_of_64_mebibytes(tmp_path: Path, count_cases: CountCases, rng_seed: int) -> None:
    path = large_file(tmp_path / "large.pt", 50, 64 * MEBIBYTE // 50 // 4 * 4)
    count_cases(FLIPPED, check_large(path, random.Random(rng_seed), 10_000))
    path.unlink()
