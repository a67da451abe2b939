"""The checkpoint process is killed, stopped, cut off, or hangs: its saves fail, and the next one works."""

import os
import signal
import threading
from pathlib import Path

import pytest
from tests.helpers.interruptions import interrupt_starts
from tests.helpers.saves import assert_state, contents, read, state_of, temporaries
from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child
from tests.process.processes import Ends, held, new_process, pid_of, pipe, receive, started

from lastgood.errors import CheckpointProcessError


def test_hazard_01_a_process_killed_in_mid_write_fails_that_save_and_the_next_works(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pipe() as (ours, theirs), started(in_child.gated_writer, {"pipe": theirs}) as process:
        first = process.write(state_of(1), str(path))
        for _ in range(2):
            receive(ours)
            ours.send("go")
        first.result(PATIENCE_SECS)
        before = contents(path)
        with held(state_of(2)) as snapshot:
            snapshot.place().complete()
            second = process.write(snapshot.snapshot, str(path))
            receive(ours)
            killed = pid_of(process)
            os.kill(killed, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="Child process terminated unexpectedly") as caught:
                second.result(PATIENCE_SECS)
            assert snapshot.given_back == [True]
        assert isinstance(caught.value, CheckpointProcessError)
        assert caught.value.pid == killed
        assert "signal 9, SIGKILL" in str(caught.value)
        assert contents(path)["checkpoint_0.pt"] == before["checkpoint_0.pt"]
        third = process.write(state_of(3), str(path))
        for _ in range(2):
            receive(ours)
            ours.send("go")
        third.result(PATIENCE_SECS)
        assert pid_of(process) != killed
        process.process_creation_future.result(PATIENCE_SECS)
        assert process.process is not None
        assert process.process.processes[0].is_alive()
        assert process._parent_end is not None
        assert not process._parent_end.closed
    assert_state(read(path), 3)
    assert temporaries(path) == []


def test_a_process_killed_while_idle_is_replaced_without_a_failure(tmp_path: Path) -> None:
    others = set(threading.enumerate())
    with started() as process:
        [watching] = [
            thread for thread in set(threading.enumerate()) - others if thread.name == "lastgood-checkpoint-process"
        ]
        os.kill(pid_of(process), signal.SIGKILL)
        # Not the process's end: a save that comes before that has been noticed fails.
        watching.join(PATIENCE_SECS)
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 1)


def test_a_save_whose_new_process_was_kept_from_starting_ends_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(close_timeout_secs=PATIENCE_SECS) as process, held(state_of(1)) as snapshot:
        (link,) = process._links
        os.kill(pid_of(process), signal.SIGKILL)
        assert link.join(PATIENCE_SECS)
        with monkeypatch.context() as patch:
            threads = interrupt_starts(patch, "lastgood-checkpoint-process")
            snapshot.place().complete()
            with pytest.raises(KeyboardInterrupt):
                process.write(snapshot.snapshot, str(tmp_path / "a"))
        assert snapshot.given_back == [True]
        # The process that was started all the same leaves, as nobody has anything for it to do.
        (watching,) = [thread for thread in threads if thread.name == "lastgood-checkpoint-process"]
        watching.join(PATIENCE_SECS)
        assert not watching.is_alive()
        process.write(state_of(2), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 2)


def test_a_process_that_dies_while_a_snapshot_is_being_staged_gives_it_back_after_staging(tmp_path: Path) -> None:
    with started() as process, held(state_of(1)) as snapshot:
        future = process.write(snapshot.snapshot, str(tmp_path / "a"))
        snapshot.place().advance(4096)
        os.kill(pid_of(process), signal.SIGKILL)
        with pytest.raises(CheckpointProcessError):
            future.result(PATIENCE_SECS)
        assert snapshot.given_back == []
        snapshot.complete()
        assert snapshot.given_back == [True]


def test_descriptors_of_dead_processes_are_not_kept(tmp_path: Path) -> None:
    with started() as process:
        counts = []
        for number in range(3):
            process.write(state_of(number), str(tmp_path / "a")).result(PATIENCE_SECS)
            counts.append(len(os.listdir("/proc/self/fd")))
            end = Ends(pid_of(process))
            os.kill(pid_of(process), signal.SIGKILL)
            assert end.wait()
            (link,) = process._links
            assert link.join(PATIENCE_SECS)
        assert counts[1] == counts[2]


def test_hazard_03_a_stopped_process_is_given_up_by_the_time_out(tmp_path: Path) -> None:
    with started(no_progress_timeout_secs=0.8) as process, held(state_of(1)) as snapshot:
        pid = pid_of(process)
        os.kill(pid, signal.SIGSTOP)
        snapshot.place().complete()
        future = process.write(snapshot.snapshot, str(tmp_path / "a"))
        with pytest.raises(CheckpointProcessError, match=r"no sign of progress for 0\.8 s and was killed") as caught:
            future.result(PATIENCE_SECS)
        assert caught.value.pid == pid
        assert snapshot.given_back == [True]
        process.write(state_of(2), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 2)


def test_a_writer_of_the_users_own_that_hangs_is_given_up(tmp_path: Path) -> None:
    hangs = {"init": in_child.import_torch, "no_progress_timeout_secs": 1.0}
    with pipe() as (ours, theirs), started(in_child.Hangs, {"pipe": theirs}, **hangs) as process:
        future = process.write(state_of(1), str(tmp_path / "a"))
        pid = receive(ours)
        with pytest.raises(CheckpointProcessError, match=f"{pid} gave no sign of progress"):
            future.result(PATIENCE_SECS)


def test_a_slow_writer_that_gets_on_is_not_given_up(tmp_path: Path) -> None:
    options = {"init": in_child.import_torch, "no_progress_timeout_secs": 1.0}
    with started(in_child.Busy, {"secs": 2.5}, **options) as process:
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert (tmp_path / "a").is_dir()


def test_a_process_waiting_long_for_its_trainer_to_stage_is_not_given_up(tmp_path: Path) -> None:
    options = {"init": in_child.import_torch, "no_progress_timeout_secs": 1.0}
    with (
        pipe() as (ours, theirs),
        started(in_child.StateFirst, {"pipe": theirs}, **options) as process,
        held(state_of(1)) as snapshot,
    ):
        future = process.write(snapshot.snapshot, str(tmp_path / "a"))
        snapshot.place()
        assert not ours.poll(2.0)
        snapshot.complete()
        assert receive(ours) == ("writing", str(tmp_path / "a"))
        ours.send("go")
        future.result(PATIENCE_SECS)


def test_a_pipe_closed_by_force_fails_the_next_save_and_only_that(tmp_path: Path) -> None:
    with started() as process:
        assert process._parent_end is not None
        process._parent_end.close()
        future = process.write(state_of(1), str(tmp_path / "a"))
        with pytest.raises(RuntimeError, match="Child process terminated unexpectedly"):
            future.result(PATIENCE_SECS)
        process.write(state_of(2), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 2)


def test_a_process_that_cannot_start_fails_saves_until_it_can(tmp_path: Path) -> None:
    """The start is tried again for each."""
    process = new_process(init=in_child.fail_to_start, init_arguments=("no such thing",))
    for _ in range(2):
        with held(state_of(1)) as snapshot:
            future = process.write(snapshot.snapshot, str(tmp_path / "a"))
            snapshot.place().complete()
            with pytest.raises(CheckpointProcessError, match="no such thing"):
                future.result(PATIENCE_SECS)
            assert snapshot.given_back == [True]
    process.close()
