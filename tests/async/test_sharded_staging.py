"""Asynchronous saves of sharded states: promise 4 holds for the parts of tensors, too, and plans are used again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.distributed import matrix_staging, matrix_states
from tests.distributed.matrix_pool import Pool, Ranks

from lastgood.errors import LastgoodError, RankMismatchError, TornSnapshotError, UnsupportedStateError


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks, whose checkpointers are made once."""
    pool = Pool(tmp_path_factory.mktemp("rendezvous"))
    yield pool.ranks(2)
    pool.disband()
    pool.kill()


def test_only_the_first_of_many_saves_captures_the_state(two: Ranks, tmp_path: Path) -> None:
    assert two.call(matrix_staging.save_again_and_again, str(tmp_path / "save"), 4) == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize("changing", [0, 1])
@pytest.mark.parametrize(
    ("group", "name", "how"),
    [
        ("spread", "divided", "dtensor"),
        ("spread", "divided", "counted"),
        ("spread", "divided", "local"),
        ("spread", "everywhere", "numpy"),
        ("model", "same", "local"),
    ],
)
def test_a_shard_that_changes_while_it_is_staged_fails_the_save_on_all_ranks(
    two: Ranks, changing: int, group: str, name: str, how: str, tmp_path: Path
) -> None:
    errors = two.call(matrix_staging.tear, str(tmp_path), group, name, how, changing)
    torn = errors[changing]
    assert isinstance(torn, TornSnapshotError)
    assert torn.tensor == f"{group}.{name}"
    assert isinstance(errors[1 - changing], LastgoodError)
    assert f"{group}.{name}" in str(errors[1 - changing])
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("make_state", "kind", "tensor"),
    [
        (matrix_states.partial_sum, UnsupportedStateError, "model.sum"),
        (matrix_states.other_keys_on_one_rank, RankMismatchError, "model.extra"),
    ],
)
def test_what_cannot_be_divided_is_refused_on_all_ranks_and_the_next_save_goes_through(
    two: Ranks, make_state: Callable[[], Any], kind: type[LastgoodError], tensor: str, tmp_path: Path
) -> None:
    errors = two.call(matrix_states.attempt, str(tmp_path / "refused"), make_state, True)
    assert any(type(error) is kind for error in errors)
    for error in errors:
        assert isinstance(error, LastgoodError)
        assert tensor in str(error)
    assert not (tmp_path / "refused" / "manifest.json").exists()
    assert two.call(matrix_states.attempt, str(tmp_path / "good"), matrix_states.good, True) == [None, None]


def test_a_step_of_an_optimizer_of_sharded_parameters_waits_until_they_are_staged(two: Ranks, tmp_path: Path) -> None:
    assert two.call(matrix_staging.step_while_staging, str(tmp_path / "save")) == [["waits", "done"]] * 2


def test_replicas_are_compared_as_they_are_at_each_save(two: Ranks, tmp_path: Path) -> None:
    """Whatever is remembered from the save before."""
    for number, drifted in enumerate([None, None, 1, None, 0, None]):
        path = tmp_path / str(number)
        errors = two.call(matrix_staging.save_replicas, str(path), float(number), drifted)
        assert (path / "manifest.json").exists() == (drifted is None)
        for error in errors:
            if drifted is None:
                assert error is None
            else:
                assert isinstance(error, LastgoodError)
                assert "model.same" in str(error)
                assert "model.running" not in str(error)
        assert drifted is None or any(type(error) is RankMismatchError for error in errors)


@pytest.mark.parametrize("changing", [0, 1])
def test_running_statistics_may_change_as_soon_as_save_has_returned(two: Ranks, changing: int, tmp_path: Path) -> None:
    """They are of the moment of the call, and so is what ranks compare of them."""
    errors = two.call(matrix_staging.change_running_statistics_while_staging, str(tmp_path), changing)
    assert errors == [None, None]
