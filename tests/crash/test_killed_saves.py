"""SIGKILL of a saving process before every single operation of its save: what was there stays, or what came is there.

The processes are real, and so are their deaths; each has stopped where the test wants it killed, and said so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.crash.stopping import leave_rank_1s_file, save_checkpoint, save_file
from tests.helpers.saves import assert_state, read, save, state_of, temporaries
from tests.helpers.workers import Worker

import lastgood
from lastgood.errors import CheckpointExistsError, CheckpointNotFoundError, UncommittedCheckpointError

ATOMIC_STEP = "replace"
# Before these, death finds the disk in the state that it has before the next operation that is not among them.
WITHOUT_TRACE = {
    "status",
    "list_directory",
    "available_bytes",
    "open_read",
    "open_direct",
    "pread_into",
    "lock",
    "close",
}


def killed_at(place: int, function: Callable[..., Any], *arguments: Any) -> str:
    """Run the save in a process of its own until it stops at ``place``, kill it there; the name of the place."""
    worker = Worker()
    try:
        worker.start(function, *arguments, place, with_pipe=True)
        stopped, name = worker.receive()
        assert stopped == "stopped at", name
        return str(name)
    finally:
        worker.kill()


def places_of(function: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """All places of such a save, found by letting it pass."""
    return function(None, *arguments, -1)


def worth_dying_at(names: list[str]) -> list[tuple[int, str]]:
    """The places with their names, but one for each state that the disk goes through."""
    return [(place, name) for place, name in enumerate(names) if name not in WITHOUT_TRACE]


def test_hazard_05_and_06_the_checkpoint_there_survives_its_replacements_death(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    save(path, 1)
    names = places_of(save_checkpoint, str(path), 1)
    published = names.index(ATOMIC_STEP)
    temporary_made = names.index("open_exclusive", names.index("open_exclusive") + 1)  # the first makes the lock
    assert {"open_exclusive", "pwrite", "fsync", "pre_commit", "barrier", "fsync_directory"} <= set(names)
    for place, name in worth_dying_at(names):
        save(path, 1)
        assert killed_at(place, save_checkpoint, str(path), 2) == name
        assert_state(read(path), 2 if place > published else 1)
        left = temporaries(path)
        assert len(left) == (temporary_made < place <= published), f"killed before {name}: {left}"
        save(path, 3)
        assert_state(read(path), 3)
        assert temporaries(path) == [], f"killed before {name}"


def test_a_first_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    names = places_of(save_checkpoint, str(tmp_path / "complete"), 1)
    published = names.index(ATOMIC_STEP)
    for place, name in worth_dying_at(names):
        path = tmp_path / f"step-{place}"
        assert killed_at(place, save_checkpoint, str(path), 2) == name
        if place > published:
            assert_state(read(path), 2)
        else:
            with pytest.raises(CheckpointNotFoundError):
                read(path)
        save(path, 3)
        assert_state(read(path), 3)
        assert [file.name for file in path.iterdir()] == ["checkpoint_0.pt"], f"killed before {name}"


def test_a_single_file_survives_its_replacements_death(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    names = places_of(save_file, str(file), 1)
    published = names.index(ATOMIC_STEP)
    for place, name in worth_dying_at(names):
        lastgood.save(state_of(1), file)
        assert killed_at(place, save_file, str(file), 2) == name
        assert_state(lastgood.load(file), 2 if place > published else 1)
        # What torch itself makes of it.
        assert_state(torch.load(file, weights_only=True), 2 if place > published else 1)
        lastgood.save(state_of(3), file)
        assert temporaries(tmp_path) == [], f"killed before {name}"


def save_as_rank_0_of_2(pipe: Any, path: str, number: int, place: int) -> list[str]:
    return save_checkpoint(pipe, path, number, place, world_size=2)


def test_rank_0_killed_around_the_commit_leaves_a_checkpoint_or_an_uncommitted_one(tmp_path: Path) -> None:
    """Rank 1's file is there already; the manifest decides, at one operation."""
    leave_rank_1s_file(str(tmp_path / "complete"), 1)
    names = places_of(save_as_rank_0_of_2, str(tmp_path / "complete"), 1)
    committed = names.index("link")
    assert committed > names.index("barrier") > names.index("replace")
    for place, name in worth_dying_at(names):
        path = tmp_path / f"step-{place}"
        leave_rank_1s_file(str(path), 1)
        assert killed_at(place, save_as_rank_0_of_2, str(path), 1) == name
        if place > committed:
            for rank in (0, 1):
                assert_state(read(path, rank, 2), 1)
            with pytest.raises(CheckpointExistsError):
                save_as_rank_0_of_2(None, str(path), 2, -1)
            for rank in (0, 1):
                assert_state(read(path, rank, 2), 1)
            continue
        for rank in (0, 1):
            with pytest.raises((UncommittedCheckpointError, CheckpointNotFoundError)):
                read(path, rank, 2)
        assert len(temporaries(path)) <= 1
        # The next save to this path goes well, and clears away what was left.
        leave_rank_1s_file(str(path), 2)
        save_as_rank_0_of_2(None, str(path), 2, -1)
        for rank in (0, 1):
            assert_state(read(path, rank, 2), 2)
        assert temporaries(path) == []
