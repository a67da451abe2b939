"""What shows that a tensor changed: every byte of what is small, samples of what is large."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lastgood._staging import witnesses
from lastgood._staging.plan import Planner
from lastgood._staging.witnesses import LINE, SAMPLES, Witnesses
from lastgood.errors import TornSnapshotError

LARGEST = 1 << 20


def is_found(before: bytearray, after: bytearray, *, full_check: bool = False) -> bool:
    """Whether a copy of ``after`` is found to be none of ``before``."""
    source = torch.frombuffer(before, dtype=torch.uint8)
    copy = torch.frombuffer(after, dtype=torch.uint8)
    witness = Witnesses(Planner().take({"there": {"it": source}}), [0], full_check=full_check)
    try:
        witness.check(0, copy.data_ptr())
    except TornSnapshotError as error:
        return error.tensor == "there.it"
    return False


@given(size=st.integers(1, LARGEST), data=st.data())
def test_a_changed_part_larger_than_the_gap_between_samples_is_always_found(size: int, data: st.DataObject) -> None:
    shortest = min(size, size // SAMPLES + 1 + LINE)
    length = data.draw(st.integers(shortest, size))
    start = data.draw(st.integers(0, size - length))
    before = bytearray(size)
    after = bytearray(size)
    after[start : start + length] = b"\1" * length
    assert is_found(before, after)
    assert not is_found(before, before)


@given(size=st.integers(1, SAMPLES * LINE - 1), data=st.data())
def test_any_changed_byte_of_a_small_storage_is_found(size: int, data: st.DataObject) -> None:
    after = bytearray(size)
    after[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(1, 255))
    assert is_found(bytearray(size), after)


@given(size=st.integers(1, LARGEST), data=st.data())
def test_any_changed_bit_is_found_by_a_full_check(size: int, data: st.DataObject) -> None:
    after = bytearray(size)
    after[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert is_found(bytearray(size), after, full_check=True)
    assert not is_found(after, after, full_check=True)


@pytest.mark.parametrize("lines", [16, 17, 31, 32, 1000, 1024, 1025])
def test_every_line_is_as_likely_to_be_sampled_as_any_other(monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    class Every:
        """Stands for the random numbers: says each of them in turn."""

        def __init__(self) -> None:
            self.next = self.stop = 0

        def randrange(self, stop: int) -> int:
            self.next, self.stop = self.next + 1, stop
            return self.next - 1

    every: Any = Every()
    monkeypatch.setattr(witnesses, "_random", every)
    sampled: list[int] = []
    while not every.stop or every.next < every.stop:
        offsets = list(witnesses._sample_offsets(lines * LINE + 5))
        assert SAMPLES // 2 <= len(offsets) <= SAMPLES
        sampled += offsets
    assert sorted(sampled) == [LINE * line for line in range(lines)]


def test_samples_begin_somewhere_else_each_time(rng_seed: int) -> None:
    starts = {witnesses._sample_offsets(LARGEST)[0] for _ in range(200)}
    assert len(starts) > 20
    random.seed(rng_seed)
    before = random.getstate()
    witnesses._sample_offsets(LARGEST)
    assert random.getstate() == before, "the user's random numbers are the user's"


def test_an_in_place_operation_is_found_though_not_a_sampled_byte_changed() -> None:
    tensor = torch.zeros(LARGEST)
    witness = Witnesses(Planner().take({"a": tensor}), [0], full_check=False)
    witness.check(0, tensor.data_ptr())
    tensor[:0].add_(1)
    with pytest.raises(TornSnapshotError, match="'a' changed"):
        witness.check(0, tensor.data_ptr())


@pytest.mark.parametrize("elements", [0, 1 << 10, 1 << 22])
@pytest.mark.parametrize("takes", [1, 2])
def test_a_storage_that_was_freed_or_resized_is_found_before_its_address_is_read(elements: int, takes: int) -> None:
    """Takes: the first makes the plan, the second finds it again."""
    state = {"weights": torch.ones(1 << 20)}
    planner = Planner()
    for _ in range(takes):
        taken = planner.take(state)
    witnesses = Witnesses(taken, taken.plan.large, full_check=False)
    witnesses.require_memory(0)
    state["weights"].untyped_storage().resize_(4 * elements)
    with pytest.raises(TornSnapshotError, match="'weights'"):
        witnesses.require_memory(0)
