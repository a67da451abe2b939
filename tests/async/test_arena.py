"""Shared memory for snapshots: bounded, reused, refused in time, and given back."""

import ctypes
import errno
import gc
import mmap
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.asynchronous import (
    ELEMENTS,
    arena_bytes_mapped,
    arenas_open,
    assert_equal,
    noted_events,
    shared_memory_files,
    state_of_large_tensors,
)
from tests.helpers.workers import PATIENCE_SECS

from lastgood._staging import arena as arena_module
from lastgood._staging import arena_pool as arena_pool_module
from lastgood._staging import job as job_module
from lastgood._staging.arena import Arena
from lastgood._staging.arena_pool import ArenaPool
from lastgood._staging.free_memory import available_memory
from lastgood.builder import make_async_checkpointer
from lastgood.errors import ArenaMemoryError, ConfigError
from lastgood.staging import CheckpointStagerConfig, DefaultStager

PAGE = mmap.PAGESIZE
MIB = 1 << 20


def touched(arena: Arena) -> int:
    """How many bytes of memory it takes."""
    return os.fstat(arena.descriptor).st_blocks * 512


@pytest.fixture
def before() -> tuple[int, int]:
    """How many arenas there were, and bytes of them, before the test."""
    gc.collect()
    return arenas_open(), arena_bytes_mapped()


# One arena


def test_what_is_reserved_is_there_before_it_is_used() -> None:
    arena = Arena()
    arena.resize(10 * MIB + 1)
    assert arena.size == 10 * MIB + PAGE
    assert touched(arena) == 0
    arena.reserve(3 * MIB)
    assert (arena.reserved, touched(arena)) == (3 * MIB, 3 * MIB)
    arena.reserve()
    assert arena.reserved == touched(arena) == arena.size
    with noted_events() as events:
        arena.reserve()
    assert not events
    arena.close()


def test_bytes_that_stay_keep_their_content_when_the_size_changes() -> None:
    arena = Arena()
    arena.resize(MIB)
    arena.memory(0, 3)[:] = b"abc"
    for size in (200 * MIB, PAGE):
        arena.resize(size)
        assert bytes(arena.memory(0, 3)) == b"abc"
    assert arena.reserved <= PAGE
    arena.close()


def test_each_arena_has_a_number_of_its_own() -> None:
    numbers = set()
    for _ in range(3):
        arena = Arena()
        numbers.add(arena.number)
        arena.close()
    assert len(numbers) == 3


def test_closing_gives_everything_back(before: tuple[int, int]) -> None:
    arena = Arena()
    arena.resize(MIB)
    arena.reserve()
    assert (arenas_open(), arena_bytes_mapped()) == (before[0] + 1, before[1] + MIB)
    arena.close()
    arena.close()
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_an_arena_that_nobody_closed_is_given_back_with_its_last_reference(before: tuple[int, int]) -> None:
    arena = Arena()
    arena.resize(MIB)
    del arena
    gc.collect()
    assert (arenas_open(), arena_bytes_mapped()) == before


@pytest.mark.parametrize("unused", [True, False])
def test_an_arena_that_somebody_else_may_read_keeps_its_bytes_for_them(unused: bool) -> None:
    arena = Arena()
    arena.resize(MIB)
    arena.memory(0, 3)[:] = b"abc"
    other = os.dup(arena.descriptor)
    arena.close(unused=unused)
    assert os.pread(other, 3, 0) == (b"" if unused else b"abc")
    os.close(other)


def test_hazard_14_no_file_in_dev_shm_is_used() -> None:
    files = shared_memory_files()
    arena = Arena()
    arena.resize(MIB)
    arena.reserve()
    assert shared_memory_files() == files
    arena.close()


def test_a_platform_without_such_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match="make_sync_checkpointer"):
        Arena()


# Memory that is short


def test_hazard_14_memory_that_is_not_there_is_refused_before_any_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    arena.resize(10 * MIB)
    monkeypatch.setattr(arena_module, "available_memory", lambda: 10 * MIB + (64 << 20) - 1)
    with pytest.raises(ArenaMemoryError, match="10 MiB of memory more, and 73 MiB are free") as caught:
        arena.reserve()
    assert isinstance(caught.value, MemoryError)
    assert caught.value.phase == "reserve"
    assert touched(arena) == 0
    monkeypatch.setattr(arena_module, "available_memory", lambda: 10 * MIB + (64 << 20))
    arena.reserve()
    assert touched(arena) == 10 * MIB
    # What is there already needs no more.
    monkeypatch.setattr(arena_module, "available_memory", lambda: 0)
    arena.reserve()
    arena.close()


def test_what_is_not_known_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "available_memory", lambda: None)
    arena = Arena()
    arena.resize(MIB)
    arena.reserve()
    arena.close()


def refuse(number: int) -> Any:
    def madvise(address: int, size: int, advice: int) -> int:
        ctypes.set_errno(number)
        return -1

    return madvise


def test_memory_that_the_kernel_refuses_is_an_error_and_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena()
    arena.resize(MIB)
    monkeypatch.setattr(arena_module, "_madvise", refuse(errno.ENOMEM))
    with pytest.raises(ArenaMemoryError, match="no 1 MiB of memory") as caught:
        arena.reserve()
    assert isinstance(caught.value.__cause__, OSError)
    assert arena.reserved == 0
    arena.close()


@pytest.mark.parametrize("madvise", [refuse(errno.EINVAL), refuse(errno.ENOSYS), None])
def test_kernels_that_cannot_populate_reserve_all_the_same(monkeypatch: pytest.MonkeyPatch, madvise: Any) -> None:
    monkeypatch.setattr(arena_module, "_madvise", madvise)
    arena = Arena()
    arena.resize(MIB)
    arena.reserve()
    assert touched(arena) == MIB
    arena.close()


def test_hazard_14_a_snapshot_too_large_for_the_machine_is_refused_and_the_next_one_taken(
    tmp_path: Path, before: tuple[int, int]
) -> None:
    available = available_memory()
    assert available is not None
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(available + (1 << 30))
        huge = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    with DefaultStager(CheckpointStagerConfig(use_async_staging=False)) as stager:
        with pytest.raises(ArenaMemoryError):
            stager.stage({"huge": huge})
        assert (arenas_open(), arena_bytes_mapped()) == before
        assert_equal(stager.stage(state_of_large_tensors(1)), state_of_large_tensors(1))


# Over many snapshots


@pytest.mark.parametrize("spare", [0, arena_pool_module._SPARE])
def test_hazard_14_memory_stays_bounded_over_many_snapshots(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], rng_seed: int, spare: int
) -> None:
    monkeypatch.setattr(arena_pool_module, "_SPARE", spare)
    files, choose = shared_memory_files(), random.Random(rng_seed)
    with DefaultStager(CheckpointStagerConfig(use_async_staging=False)) as stager:
        for round_number in range(50):
            elements = choose.choice([10, ELEMENTS, 10 * ELEMENTS, 40 * ELEMENTS])
            state = {"a": torch.full((elements,), float(round_number)), "b": [round_number] * choose.randrange(2000)}
            snapshot = stager.snapshot(state)
            snapshot.release()
            assert arenas_open() == before[0] + 1
            assert arena_bytes_mapped() - before[1] <= 2 * (4 * elements + MIB) + max(spare, PAGE)
            if round_number % 10 == 0:
                assert_equal(stager.stage(state), state)
                gc.collect()
        assert shared_memory_files() == files
    gc.collect()
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_hazard_14_later_saves_touch_no_new_memory(
    tmp_path: Path, before: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = make_async_checkpointer()
    try:
        with noted_events() as events:
            for number in range(10):
                state = state_of_large_tensors(number)
                checkpointer.save(str(tmp_path), state)[1].result(PATIENCE_SECS)
                assert arenas_open() == before[0] + 1
        assert sum(event.phase == "reserve" for event in events) == 1
        assert_equal(checkpointer.load(str(tmp_path)), state)
    finally:
        checkpointer.close()
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_hazard_14_futures_that_nobody_keeps_give_their_memory_to_the_next(before: tuple[int, int]) -> None:
    with DefaultStager() as stager:
        with noted_events() as events:
            for number in range(5):
                future: Any = stager.stage(state_of_large_tensors(number))
                assert_equal(future.result(PATIENCE_SECS), state_of_large_tensors(number))
                del future
                idle = threading.Event()
                stager._run_later(idle.set)  # the thread that staged has let go of it, too
                assert idle.wait(PATIENCE_SECS)
        assert sum(event.phase == "reserve" for event in events) == 1
    gc.collect()
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_hazard_14_failures_that_somebody_keeps_keep_no_memory(before: tuple[int, int]) -> None:
    def fail(*arguments: Any) -> None:
        raise BlockingIOError

    kept = []
    with DefaultStager() as stager:
        for _ in range(8):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job_module, "lay_out", fail)
                future: Any = stager.stage(state_of_large_tensors(1))
                kept.append(future.exception(PATIENCE_SECS))
                del future
        # One may still be on its way back.
        assert arenas_open() <= before[0] + 2
        assert all(isinstance(error, BlockingIOError) for error in kept)
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_as_many_arenas_are_kept_as_snapshots_may_be_in_flight(before: tuple[int, int]) -> None:
    for kept in (1, 2):
        config = CheckpointStagerConfig(use_async_staging=False, snapshots_in_flight=kept)
        with DefaultStager(config) as stager:
            for _ in range(3):
                snapshots = [stager.snapshot(state_of_large_tensors(1)) for _ in range(4)]
                assert arenas_open() == before[0] + 4
                for snapshot in snapshots:
                    snapshot.release()
                assert arenas_open() == before[0] + kept
        assert (arenas_open(), arena_bytes_mapped()) == before


# The pool


def test_an_arena_that_somebody_may_still_read_is_never_used_again(before: tuple[int, int]) -> None:
    pool = ArenaPool(2, pinned=False)
    arena = pool.make(MIB, None)
    pool.give_back(arena, False)
    assert (arenas_open(), arena_bytes_mapped()) == before
    assert pool.make(MIB, None) is not arena
    pool.close()


def test_arenas_given_back_after_the_end_are_given_up(before: tuple[int, int]) -> None:
    pool = ArenaPool(2, pinned=False)
    lent, free = pool.make(MIB, None), pool.make(MIB, None)
    pool.give_back(free)
    pool.close()
    assert arenas_open() == before[0] + 1
    pool.give_back(lent)
    assert (arenas_open(), arena_bytes_mapped()) == before


def test_an_arena_is_found_by_the_plan_it_is_laid_out_by() -> None:
    pool = ArenaPool(3, pinned=False)
    arenas = [pool.make(MIB, None) for _ in range(3)]
    for number, arena in enumerate(arenas):
        arena.content = (number, 0)
        pool.give_back(arena)
    assert pool.find(7) is None
    assert pool.find(1) is arenas[1]
    assert pool.find(1) is None, "it is its finder's"
    pool.give_back(arenas[1])
    pool.close()
