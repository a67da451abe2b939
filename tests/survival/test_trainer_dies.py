"""Hazard 4: the trainer dies, however and whenever; what was staged lands, and nothing else is left of it."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from tests.helpers.saves import assert_state, save, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.process.processes import pipe
from tests.survival.traces import ProcessEnd, holders, names
from tests.survival.trainers import ELEMENTS, Told, file_in, save_and_train, save_at_any_time, save_halfway, trainer

import lastgood
from lastgood.builder import make_async_checkpointer

RUNS = pytest.mark.parametrize(
    "runs", [5, pytest.param(100, marks=[pytest.mark.crash, pytest.mark.timeout(3600)], id="100")]
)


def assert_lands(path: Path, number: int) -> None:
    assert_state(lastgood.load(file_in(path)), number, ELEMENTS)
    assert names(path) == ["checkpoint_0.pt"]


def assert_memory_is_free(told: Told) -> None:
    assert told.shared_memory
    assert holders(told.shared_memory) == []


@RUNS
def test_hazard_04_sigkill_at_random_moments_after_staging_loses_nothing(
    tmp_path: Path, rng_seed: int, runs: int
) -> None:
    """By turns of the first save, when the process is just being started, and of one that replaces an earlier one."""
    rng = random.Random(rng_seed)
    usual_secs: dict[bool, float] = {}
    for run in range(runs):
        path, number = tmp_path / f"run-{run}", 2 * run + 1
        is_first = bool(run % 2)
        earlier = None if is_first else 2 * run
        with (
            trainer(save_and_train, str(path), earlier, number) as worker,
            ProcessEnd((told := worker.receive()).checkpoint_process) as end,
        ):
            staged = time.monotonic()
            assert not end.wait(rng.uniform(0, usual_secs.get(is_first, 0)))
            worker.kill()
            assert end.wait()
            usual_secs.setdefault(is_first, 1.2 * (time.monotonic() - staged))
            assert_lands(path, number)
            assert_memory_is_free(told)
        shutil.rmtree(path)


@RUNS
def test_hazard_04_sigkill_at_any_moment_of_a_save_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, rng_seed: int, runs: int
) -> None:
    rng = random.Random(rng_seed)
    usual_secs = 0.1
    found = set()
    for run in range(runs):
        path, number = tmp_path / f"run-{run}", 2 * run
        with (
            trainer(save_at_any_time, str(path), number) as worker,
            ProcessEnd((told := worker.receive()).checkpoint_process) as end,
        ):
            assert not end.wait(rng.uniform(0, usual_secs))
            worker.kill()
            assert end.wait()
        state = lastgood.load(file_in(path))
        assert state["step"] in (number, number + 1)
        found.add(state["step"] - number)
        assert_lands(path, state["step"])
        assert_memory_is_free(told)
        shutil.rmtree(path)
    print(f"0: the old one, 1: the new one; found {sorted(found)}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whole_group", [False, True], ids=["alone", "with its process group"])
def test_hazard_04_every_other_signal_after_staging_loses_nothing_either(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    path = tmp_path / "checkpoint"
    with (
        trainer(save_and_train, str(path), None, 1, own_group=whole_group) as worker,
        ProcessEnd((told := worker.receive()).checkpoint_process) as end,
        ProcessEnd(worker.pid) as death,
    ):
        (os.killpg if whole_group else os.kill)(worker.pid, number)
        assert death.wait()
        assert end.wait()
    assert_lands(path, 1)
    assert_memory_is_free(told)


def test_hazard_04_an_exit_without_a_word_after_staging_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with (
        pipe() as (ours, theirs),
        trainer(save_and_train, str(path), None, 1, may_leave=theirs) as worker,
        ProcessEnd((told := worker.receive()).checkpoint_process) as end,
    ):
        ours.send("leave")  # by os._exit
        assert end.wait()
    assert_lands(path, 1)
    assert_memory_is_free(told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_hazard_04_a_signal_to_every_process_of_the_job_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """What service managers and schedulers send to all that a job has started, whatever group or session it is in."""
    path = tmp_path / "checkpoint"
    with (
        trainer(save_and_train, str(path), 1, 2) as worker,
        ProcessEnd((told := worker.receive()).checkpoint_process) as end,
    ):
        os.kill(told.checkpoint_process, number)
        worker.kill()
        assert end.wait()
    assert_lands(path, 2)
    assert_memory_is_free(told)


@pytest.mark.parametrize("whole_group", [False, True], ids=["alone", "with its process group"])
def test_hazard_04_with_persistent_data_loader_workers_alive(tmp_path: Path, whole_group: bool) -> None:
    """They hold copies of the trainer's descriptors, and its shared memory mapped."""
    path = tmp_path / "checkpoint"
    with (
        # With a group of their own, stopped loaders would get SIGHUP when the trainer dies, from the kernel.
        trainer(save_and_train, str(path), None, 1, own_group=whole_group, loaders=True) as worker,
        ProcessEnd((told := worker.receive()).checkpoint_process) as end,
    ):
        loaders = [ProcessEnd(pid) for pid in told.others]
        assert len(loaders) == 2
        if whole_group:
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            for loader in loaders:
                os.kill(loader.pid, signal.SIGSTOP)  # so that they outlive the trainer for certain
            os.kill(worker.pid, signal.SIGKILL)
        assert end.wait()
        assert_lands(path, 1)
        for loader in loaders:
            with loader:
                if not whole_group:
                    os.kill(loader.pid, signal.SIGKILL)
                assert loader.wait()
    assert_memory_is_free(told)


@pytest.mark.parametrize("pieces", [0, 1])
def test_hazard_04_what_was_not_wholly_staged_is_dropped_without_a_trace(tmp_path: Path, pieces: int) -> None:
    path = tmp_path / "checkpoint"
    save(path, 1)
    before = file_in(path).read_bytes()
    with (
        trainer(save_halfway, str(path), 2, pieces) as worker,
        ProcessEnd((told := worker.receive()).checkpoint_process) as end,
    ):
        worker.kill()
        assert end.wait()
    assert file_in(path).read_bytes() == before
    assert_memory_is_free(told)
    checkpointer = make_async_checkpointer()
    checkpointer.save(str(path), state_of(3, ELEMENTS))[1].result(PATIENCE_SECS)
    checkpointer.close()
    assert_lands(path, 3)
