"""Loads of sharded states read what they need and no more, and find damage in whichever rank's file it is."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed import matrix_ranks, matrix_reading
from tests.distributed.matrix_files import flip_byte_of
from tests.distributed.matrix_pool import Pool
from tests.unit.sharding.ballots import count, files_of, sharded

from lastgood.checkpoint_reader import CheckpointReader
from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, UncommittedCheckpointError
from lastgood.format.manifest import encode_manifest
from lastgood.format.mesh import Mesh
from lastgood.format.spec import BLOCK_SIZE
from lastgood.types import RankInfo

MIB = 1024 * 1024
MESH = Mesh((3,), None, (0, 1, 2))
FIRST, SECOND = torch.arange(90.0).view(9, 10), torch.arange(700.0)


@pytest.fixture(scope="module")
def fsdp_of_three(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("three") / "checkpoint"
    pool.ranks(3).call(matrix_ranks.save, str(path), "fsdp", False)
    return path


# What is read


def test_a_rank_that_loads_what_it_saved_opens_its_own_file_alone(pool: Pool, fsdp_of_three: Path) -> None:
    opened = pool.ranks(3).call(matrix_reading.files_opened, str(fsdp_of_three), "fsdp")
    assert opened == [[f"checkpoint_{rank}.pt"] for rank in range(3)]


def test_a_load_into_another_layout_reads_just_the_blocks_that_it_needs(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path)
    pool.ranks(4).call(matrix_reading.save_large, path)  # 4 MiB in each file
    around = 2 * BLOCK_SIZE  # a first and a last block of which a part is wanted
    beside = 64 * 1024  # directory, index, checksums

    [first, second] = pool.ranks(2).call(matrix_reading.bytes_read_of_large, path, 0)
    # Rank 0 needs the files 0 and 1. The own file is opened in any case, for what is in no sharded tensor.
    assert {name for name, read in first.items() if read > beside} == {"checkpoint_0.pt", "checkpoint_1.pt"}
    assert {name for name, read in second.items() if read > beside} == {"checkpoint_2.pt", "checkpoint_3.pt"}
    for read in (first, second):
        assert sum(read.values()) <= 8 * MIB + 2 * around + len(read) * beside

    for rank, read in enumerate(pool.ranks(8).call(matrix_reading.bytes_read_of_large, path, 0)):
        needed = f"checkpoint_{rank // 2}.pt"
        assert 2 * MIB <= read[needed] <= 2 * MIB + around + beside
        assert all(amount <= beside for name, amount in read.items() if name != needed)

    # Every row of every file, of which only blocks can be read: each once.
    for read in pool.ranks(2).call(matrix_reading.bytes_read_of_large, path, 1):
        assert sorted(read) == [f"checkpoint_{rank}.pt" for rank in range(4)]
        assert all(amount <= 4 * MIB + around + beside for amount in read.values())

    # On a machine of many ranks these are read once from the device, for all; rows are wanted by one rank alone.
    every_file = [f"checkpoint_{rank}.pt" for rank in range(4)]
    shared = matrix_reading.files_shared_on_a_machine_of
    assert pool.ranks(2).call(shared, 4, path, 1) == [every_file, every_file]
    assert pool.ranks(2).call(shared, 2, path, 1) == [[], []]
    assert pool.ranks(2).call(shared, 4, path, 0) == [[], []]


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """How many files this process may have open, until it asks for more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    yield count
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_one_process_loads_more_files_than_it_may_have_open_by_default(tmp_path: Path, few_descriptors: int) -> None:
    ranks = few_descriptors + 1
    mesh, whole = Mesh((ranks,), None, tuple(range(ranks))), torch.arange(float(ranks))
    states = [{"all": sharded("all", whole, mesh, ("S(0)",), rank)} for rank in range(ranks)]
    manifest = count(files_of(tmp_path, states))
    (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
    assert torch.equal(load(tmp_path)["all"], whole)


# Damage


def commit(path: Path, seed: float = 0) -> Path:
    """The checkpoint of three ranks with two tensors that are spread over them."""
    states = [
        {
            "model": {
                "first": sharded("model.first", FIRST + seed, MESH, ("S(0)",), rank),
                "second": sharded("model.second", SECOND + seed, MESH, ("S(0)",), rank),
            },
            "step": 3,
        }
        for rank in range(3)
    ]
    path.mkdir()
    manifest = count(files_of(path, states))
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return commit(tmp_path / "checkpoint")


def load(path: Path, target: Any = None, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    return CheckpointReader(RankInfo(rank, world_size)).read(str(path), target, **options)[0]


def zeros() -> dict[str, Any]:
    return {"model": {"first": torch.zeros(9, 10), "second": torch.zeros(700)}, "step": -1}


@pytest.mark.parametrize("damaged", range(3))
@pytest.mark.parametrize("given", [False, True])
def test_a_flipped_bit_in_any_ranks_file_is_found_and_named(saved: Path, damaged: int, given: bool) -> None:
    flip_byte_of(saved / f"checkpoint_{damaged}.pt", "model.second")
    for rank, world_size in ((0, 1), (1, 2), (3, 5), (0, 3), (2, 3)):
        target = zeros() if given else None
        with pytest.raises(CorruptCheckpointError, match=r"model\.second") as caught:
            load(saved, target, rank, world_size)
        assert caught.value.path == str(saved / f"checkpoint_{damaged}.pt")
        assert caught.value.tensor is not None
        assert caught.value.tensor.startswith("model.second")
        if given:
            assert "model.second" in caught.value.undefined_targets


@pytest.mark.parametrize("damaged", range(3))
def test_verify_first_touches_nothing_where_any_file_that_is_needed_is_damaged(saved: Path, damaged: int) -> None:
    flip_byte_of(saved / f"checkpoint_{damaged}.pt", "model.second")
    target = zeros()
    with pytest.raises(CorruptCheckpointError, match=r"model\.second"):
        load(saved, target, verify_first=True)
    assert target["step"] == -1
    assert not target["model"]["first"].any()
    assert not target["model"]["second"].any()


@pytest.mark.parametrize("given", [False, True])
def test_without_verification_the_damaged_data_comes_as_it_is(saved: Path, given: bool) -> None:
    flip_byte_of(saved / "checkpoint_1.pt", "model.second")
    found = load(saved, zeros() if given else None, verify=False)
    assert torch.equal(found["model"]["first"], FIRST)
    assert (found["model"]["second"] != SECOND).sum() == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("damaged", range(3))
def test_with_verify_whole_the_ranks_together_check_every_file(saved: Path, damaged: int, world_size: int) -> None:
    """Whatever each of them wants; one of them finds the damage."""
    flip_byte_of(saved / f"checkpoint_{damaged}.pt", "model.second")
    found = {}
    for rank in range(world_size):
        target = {"model": {"first": torch.zeros(9, 10)}}
        try:
            load(saved, target, rank, world_size, verify_whole=True)
        except CorruptCheckpointError as error:
            found[rank] = error.path
    assert found == {damaged % world_size: str(saved / f"checkpoint_{damaged}.pt")}


def test_a_tensor_that_is_not_damaged_still_loads(saved: Path) -> None:
    flip_byte_of(saved / "checkpoint_1.pt", "model.second")
    target = {"model": {"first": torch.zeros(9, 10)}}
    assert torch.equal(load(saved, target)["model"]["first"], FIRST)


def test_a_file_that_is_missing_is_named(saved: Path) -> None:
    (saved / "checkpoint_2.pt").unlink()
    target = zeros()
    for given in (None, target):
        with pytest.raises(CheckpointNotFoundError, match=r"checkpoint_2\.pt"):
            load(saved, given)
    with pytest.raises(CheckpointNotFoundError, match=r"checkpoint_2\.pt"):
        load(saved, target, verify_first=True)


@pytest.mark.parametrize("damaged", range(3))
def test_a_file_that_ends_too_early_is_named(saved: Path, damaged: int) -> None:
    path = saved / f"checkpoint_{damaged}.pt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptCheckpointError, match=rf"checkpoint_{damaged}\.pt"):
        load(saved, zeros())


def test_a_file_of_another_save_is_never_mixed_in(saved: Path, tmp_path: Path) -> None:
    other = commit(tmp_path / "other", seed=1000)
    shutil.copy(other / "checkpoint_2.pt", saved / "checkpoint_2.pt")
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_2\.pt is not the file that the manifest"):
        load(saved)


def test_without_the_manifest_no_part_of_a_tensor_passes_for_all_of_it(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(UncommittedCheckpointError):
        load(saved, rank=0, world_size=3)
    target = zeros()
    with pytest.raises(UncommittedCheckpointError, match="only a part of a tensor"):
        load(saved, target, rank=0, world_size=3, allow_uncommitted=True)
    assert not target["model"]["first"].any()


# Damage, and real ranks


def test_ranks_of_another_layout_find_damage_where_they_read_it(
    pool: Pool, fsdp_of_three: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(fsdp_of_three, tmp_path / "checkpoint")
    flip_byte_of(path / "checkpoint_2.pt", "model.up.weight")
    two = pool.ranks(2)
    [(first, _), (second, _)] = two.call(matrix_reading.load_damaged, str(path), "fsdp", {})
    assert first is None  # its half is in the files of the ranks 0 and 1
    assert isinstance(second, CorruptCheckpointError)
    assert second.path == str(path / "checkpoint_2.pt")
    assert "model.up.weight" in str(second)
    for error, changed in two.call(matrix_reading.load_damaged, str(path), "tp", {"verify_first": True}):
        assert isinstance(error, CorruptCheckpointError)
        assert changed == []
    assert [error for error, _ in two.call(matrix_reading.load_damaged, str(path), "fsdp", {"verify": False})] == [
        None,
        None,
    ]
    others = ["emb.weight", "down.weight", "up.bias"]
    assert two.call(matrix_reading.holds_the_saved, "fsdp", others) == [True, True]
    assert two.call(matrix_reading.holds_the_saved, "fsdp", ["up.weight"]) == [True, False]
