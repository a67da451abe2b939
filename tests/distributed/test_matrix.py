"""What one layout saves, every other one loads: to the bit, in place, the optimizer's state included."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.distributed import matrix_ranks
from tests.distributed.matrix_pairs import FEW_PAIRS, Pair, all_pairs, by_groups, few_pairs, is_quick, together
from tests.distributed.matrix_pool import Pool, Ranks

FEW, ALL = by_groups(few_pairs()), by_groups(all_pairs())


def ranks_of(pool: Pool, layout: str, world_size: int) -> Ranks:
    """Those of a layout; the plain one knows of no process group."""
    return pool.alone() if layout == "plain" else pool.ranks(world_size)


class Checkpoints:
    """What the pairs save, each once."""

    def __init__(self, pool: Pool, directory: Path, pairs: Sequence[Pair]) -> None:
        self.pool = pool
        self._directory = directory
        self._failures: dict[str, Exception] = {}
        saves = {pair[:2] + pair[4:] for pair in pairs}
        for layout, ranks, asynchronous in sorted(saves, key=lambda save: (save[0] != "plain", save[1], save)):
            path = self._path(layout, ranks, asynchronous)
            try:
                ranks_of(pool, layout, ranks).call(matrix_ranks.save, path, layout, asynchronous)
            except Exception as error:  # that of the pairs that need it, and of no other
                self._failures[path] = error

    def _path(self, layout: str, ranks: int, asynchronous: bool) -> str:
        return str(self._directory / f"{layout}-{ranks}-{'async' if asynchronous else 'sync'}")

    def saved_by(self, pair: Pair) -> str:
        """The checkpoint that a pair loads."""
        path = self._path(pair.saved, pair.saved_ranks, pair.asynchronous)
        if path in self._failures:
            raise self._failures[path]
        return path


@pytest.fixture(scope="module")
def few(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(pool, tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def every(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(pool, tmp_path_factory.mktemp("every"), ALL)


def check(pair: Pair, checkpoints: Checkpoints) -> None:
    """Load in each way that there is."""
    path = checkpoints.saved_by(pair)
    ranks = ranks_of(checkpoints.pool, pair.loaded, pair.loaded_ranks)
    ranks.call(matrix_ranks.load_into_state_dicts, path, pair.loaded, pair.saved_ranks)
    ranks.call(matrix_ranks.load_into_module, path, pair.loaded)
    if pair.loaded == "plain":
        ranks.call(matrix_ranks.load_whole, path)


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_a_layout_loads_what_another_one_saved(pair: Pair, few: Checkpoints) -> None:
    check(pair, few)


@pytest.mark.crash
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pair", ALL, ids=str)
def test_every_layout_loads_what_every_other_one_saved(pair: Pair, every: Checkpoints) -> None:
    check(pair, every)


def test_every_two_choices_meet_in_one_of_the_few_pairs() -> None:
    quick = [pair for pair in ALL if is_quick(pair)]
    assert len(FEW) <= FEW_PAIRS
    assert set(FEW) <= set(quick)
    assert set().union(*map(together, FEW)) == set().union(*map(together, quick))
    assert {pair[:2] for pair in quick} == {pair[:2] for pair in ALL}
