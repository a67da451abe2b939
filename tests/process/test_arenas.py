"""A trainer's arena, as its checkpoint process has it."""

import os

import pytest

from lastgood._process.jobs import _Arena


def test_an_arena_that_was_given_up_is_not_taken_for_memory_of_nobodys() -> None:
    """Which would be a snapshot of zeros, and no error."""
    arena = _Arena(os.memfd_create("arena"))
    arena.close()
    arena.close()
    with pytest.raises(ValueError, match="given up"):
        arena.memory(4096)


def test_an_arena_that_cannot_be_mapped_is_mapped_later() -> None:
    descriptor = os.memfd_create("arena")
    own = os.dup(descriptor)
    arena = _Arena(descriptor)
    with pytest.raises(ValueError, match="mmap length"):
        arena.memory(4096)
    os.truncate(own, 4096)
    os.pwrite(own, b"data", 0)
    assert arena.memory(4096)[:4] == b"data"
    arena.close()
    os.close(own)
