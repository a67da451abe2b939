"""Runs whose processes are killed: before every operation of a save and of what follows it, or in the middle of one."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.crash.test_killed_saves import killed_at, worth_dying_at
from tests.distributed.barrier_ranks import start
from tests.helpers.saves import assert_state, contents, temporaries
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.manager.runs import (
    ELEMENTS,
    assert_resumes,
    directories,
    file_of,
    make_run,
    manager_of,
    restore,
    wait_for,
    word_in_the_log,
)
from tests.manager.trainers import resume_save_and_tidy, save_gated, train
from tests.process.processes import pipe, receive
from tests.survival.traces import ProcessEnd
from tests.survival.trainers import trainer

import lastgood
from lastgood.manager.catalog import Condition, read_catalog
from lastgood.manager.retention import KeepLast
from lastgood.storage.local import LocalStorage


def test_hazard_06_07_08_killed_before_any_operation_of_save_and_retention_nothing_good_is_lost(
    tmp_path: Path,
) -> None:
    """Step 30 is saved anew, then step 10 is removed: at each moment the old or the new step 30 is there, whole."""
    make_run(tmp_path / "template", [10, 20, 30])
    shutil.copytree(tmp_path / "template", tmp_path / "complete")
    names = resume_save_and_tidy(None, str(tmp_path / "complete"), -1)
    assert directories(tmp_path / "complete") == ["step-20", "step-30"]
    published, removed = names.index("replace"), names.index("remove_directory")
    unlinked = [place for place, name in enumerate(names) if name == "unlink" and place > published]
    assert published < unlinked[0] < removed
    ends = set()
    for place, name in worth_dying_at(names):
        root = tmp_path / f"run-{place}"
        shutil.copytree(tmp_path / "template", root)
        assert killed_at(place, resume_save_and_tidy, str(root)) == name
        is_new = place > published
        for entry in read_catalog(LocalStorage(), str(root)).entries:
            if entry.is_committed:
                number = entry.step + 1 if entry.step == 30 and is_new else entry.step
                assert_state(lastgood.load(file_of(root, entry.step)), number, ELEMENTS)
            else:
                assert entry.condition is Condition.UNFINISHED
                assert (entry.step, is_new) == (10, True), f"killed before {name}"
        assert_resumes(root, 30, 31 if is_new else 30)
        with manager_of(root) as manager:
            assert {20, 30} <= set(manager.steps())
            ends.add(10 in manager.steps())
        # The next life clears away what was left.
        resume_save_and_tidy(None, str(root), -1)
        assert directories(root) == ["step-20", "step-30"], f"killed before {name}"
        assert temporaries(root / "step-30") == []
        shutil.rmtree(root)
    assert ends == {True, False}


@contextmanager
def save_under_way(root: Path, step: int) -> Iterator[tuple[Worker, ProcessEnd, Connection]]:
    """A trainer, its checkpoint process, and the gate before which the save has come to a halt, nearly done."""
    with (
        pipe() as (ours, theirs),
        trainer(partial(save_gated, gate=theirs, root=str(root), step=step)) as worker,
        ProcessEnd(worker.receive()) as process,
    ):
        assert receive(ours)[0] == "pre_commit"
        yield worker, process, ours


def test_hazard_22_a_save_whose_processes_were_all_killed_is_passed_over_left_alone_and_cleared_away_later(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, [5, 10])
    with save_under_way(tmp_path, 20) as (worker, process, _):
        process.send_signal(signal.SIGKILL)
        assert process.wait()
        worker.kill()
    half = temporaries(tmp_path / "step-20")
    assert len(half) == 1
    before = contents(tmp_path / "step-20")
    assert assert_resumes(tmp_path, 10) == (20,)
    assert contents(tmp_path / "step-20").items() <= before.items()
    assert temporaries(tmp_path / "step-20") == half
    with manager_of(tmp_path, keep=KeepLast(2)) as manager:
        restore(manager)
        assert manager.steps() == [5, 10]
        assert manager.passed_over[0].is_damaged is False
        manager.save(15, manager_state := {"step": 15})
        manager.wait()
        # It is newer than the newest checkpoint, so it may still be under way; and it is none of the last two.
        assert directories(tmp_path) == ["step-10", "step-15", "step-20"]
        manager.save(30, manager_state)
        manager.wait()
        assert directories(tmp_path) == ["step-15", "step-30"]


@pytest.mark.parametrize("fate", ["it lands", "it fails", "it is killed"])
def test_hazard_22_a_save_that_a_former_process_is_still_writing_is_waited_for(tmp_path: Path, fate: str) -> None:
    make_run(tmp_path, [10])
    with save_under_way(tmp_path, 20) as (worker, process, gate), word_in_the_log("waiting for it") as waits:
        worker.kill()
        with manager_of(tmp_path) as manager:
            resumed = start(restore, manager)
            wait_for(waits)
            assert not resumed.done()
            assert directories(tmp_path) == ["step-10", "step-20"]
            if fate == "it is killed":
                process.send_signal(signal.SIGKILL)
            else:
                gate.send("go" if fate == "it lands" else "fail")
            if fate == "it lands":
                assert receive(gate)[0] == "post_commit"
                gate.send("go")
            step, state = resumed.result(PATIENCE_SECS)
            expected = 20 if fate == "it lands" else 10
            assert step == expected
            assert_state(state, expected, ELEMENTS)
        assert process.wait()


def test_a_training_that_exits_and_resumes_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Dropout, draws from Python, NumPy and torch, a scheduler, a sampler; each life is a process of its own."""

    def live(root: str, steps: int, **options: bool) -> tuple[int, list[float], bytes]:
        worker = Worker()
        try:
            result: tuple[int, list[float], bytes] = worker.call(partial(train, **options), str(tmp_path / root), steps)
            assert worker.exit() == 0
        finally:
            worker.kill()
        return result

    straight = live("straight", 9)
    assert straight[0] == 0
    assert live("broken", 4)[1] == straight[1][:4]
    assert live("broken", 7) == (4, straight[1][:7], live("straight to 7", 7)[2])  # its last step is not saved
    assert live("broken", 9) == (6, *straight[1:])
    # The states of the generators are what does it.
    live("without", 4, random_states=False)
    assert live("without", 9, random_states=False)[1] != straight[1]
