"""Asynchronous checkpoints of several ranks, each a trainer of its own with a checkpoint process of its own.

The trainers stand in this test's process: what has to meet are the checkpoint processes.
"""

import concurrent.futures
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.distributed.barrier_ranks import reserved_port, store_arguments
from tests.helpers.saves import assert_state, commit_together, contents, read, state_of

from lastgood.barriers import BarrierConfig
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import CheckpointExistsError, ConfigError, UncommittedCheckpointError
from lastgood.types import RankInfo

PATIENCE_SECS = 90.0


@contextmanager
def ranks(world_size: int, barrier: bool) -> Iterator[list[AsyncCheckpointer]]:
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        checkpointers = []
        for rank in range(world_size):
            config = CheckpointerConfig(process_config=CheckpointProcessConfig(subprocess_init_timeout_secs=90))
            if barrier:
                config.barrier_config = BarrierConfig("tcp_store", store_arguments(rank, world_size, port))
            checkpointers.append(make_async_checkpointer(config, RankInfo(rank, world_size)))
            stack.callback(checkpointers[-1].close)
        yield checkpointers


def save(checkpointers: list[AsyncCheckpointer], path: Path, number: int) -> list[BaseException | None]:
    """All ranks at once, each its own state; how each write ended."""
    futures = [
        checkpointer.save(str(path), state_of(number + rank))[1] for rank, checkpointer in enumerate(checkpointers)
    ]
    _, late = concurrent.futures.wait(futures, PATIENCE_SECS)
    assert not late
    return [future.exception() for future in futures]


def torch_is_imported(checkpointer: AsyncCheckpointer) -> bool:
    checkpointer._checkpoint_process.process_creation_future.result(PATIENCE_SECS)
    return bool(checkpointer._checkpoint_process.ping()["torch_is_imported"])


def test_ranks_without_a_barrier_write_independent_files_and_import_no_torch_for_it(tmp_path: Path) -> None:
    with ranks(2, barrier=False) as checkpointers:
        for number in (1, 5):  # onto each other
            assert save(checkpointers, tmp_path, number) == [None, None]
            assert sorted(contents(tmp_path)) == ["checkpoint_0.pt", "checkpoint_1.pt"]
            for rank in (0, 1):
                assert_state(read(tmp_path, rank, 2), number + rank)
        assert not any(map(torch_is_imported, checkpointers))


def test_the_barrier_is_made_in_the_checkpoint_processes_and_rank_0_commits_for_all(tmp_path: Path) -> None:
    with ranks(2, barrier=True) as checkpointers:
        for step in (1, 2):
            path = tmp_path / f"step-{step}"
            assert save(checkpointers, path, step) == [None, None]
            assert sorted(contents(path)) == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
            assert json.loads((path / "manifest.json").read_text())["manifest"]["world_size"] == 2
            for rank, checkpointer in enumerate(checkpointers):
                assert_state(checkpointer.load(str(path)), step + rank)

        # Onto a committed one, both refuse before anything is staged.
        before = contents(tmp_path)
        for checkpointer in checkpointers:
            with pytest.raises(CheckpointExistsError, match="committed checkpoint of several ranks"):
                checkpointer.save(str(tmp_path / "step-1"), state_of(9))
        assert contents(tmp_path) == before
        assert save(checkpointers, tmp_path / "step-3", 3) == [None, None]


def test_a_file_of_a_rank_whose_fellow_never_came_is_no_checkpoint(tmp_path: Path) -> None:
    arguments = store_arguments(0, 1, 0)
    config = CheckpointerConfig(barrier_config=BarrierConfig("tcp_store", arguments | {"barrier_prefix": "alone"}))
    config.process_config = CheckpointProcessConfig(subprocess_init_timeout_secs=90)
    config.writer_config.write_barrier_timeout_secs = 1
    checkpointer = make_async_checkpointer(config, RankInfo(0, 2))  # its barrier thinks that it is alone
    _, written = checkpointer.save(str(tmp_path / "step-1"), state_of(1))
    assert written.exception(PATIENCE_SECS) is not None  # there is no file of rank 1 to commit
    checkpointer.close()
    assert not (tmp_path / "step-1" / "manifest.json").exists()
    with pytest.raises(UncommittedCheckpointError):
        read(tmp_path / "step-1", 0, 2)


def test_a_save_of_one_rank_never_replaces_a_checkpoint_of_several(tmp_path: Path) -> None:
    assert commit_together(tmp_path, 1) == [None, None]
    before = contents(tmp_path)
    checkpointer = make_async_checkpointer()
    with pytest.raises(CheckpointExistsError, match="nothing was written"):
        checkpointer.save(str(tmp_path), state_of(3))
    assert contents(tmp_path) == before
    # Nothing was staged either, and nothing failed that close() would have to tell of.
    assert checkpointer._checkpoint_stager._pool._free == []  # type: ignore[attr-defined]
    checkpointer.close()


def test_the_trainings_own_barrier_cannot_be_used_by_another_process() -> None:
    with pytest.raises(ConfigError, match="use the barrier type tcp_store"):
        make_async_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("dist_barrier")))
    with pytest.raises(ConfigError, match="Unknown barrier type: tcp_stroe"):
        make_async_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("tcp_stroe")))
