"""How a meeting of ranks is decided."""

import pytest
import torch.distributed as dist

from lastgood._coordination.meeting import ALL_CAME, Meeting, Outcome

GAVE_UP = Outcome("rank 1 gave up", (1,))


@pytest.mark.parametrize(("first", "second"), [(ALL_CAME, GAVE_UP), (GAVE_UP, ALL_CAME)])
def test_the_first_decision_stands(first: Outcome, second: Outcome) -> None:
    """Whoever hears a later one could call a checkpoint durable that is not, or throw away one that is."""
    store = dist.HashStore()
    ranks = [Meeting(store, "save", rank, 2) for rank in range(2)]
    ranks[0].decide(first)
    ranks[1].decide(second)
    assert [rank.outcome() for rank in ranks] == [first, first]


def test_a_rank_that_comes_twice_counts_once() -> None:
    store = dist.HashStore()
    meeting = Meeting(store, "save", 0, 2)
    assert [meeting.arrive(), meeting.arrive()] == [1, 0]
    assert meeting.missing() == (1,)
    assert Meeting(store, "save", 1, 2).arrive() == 2
