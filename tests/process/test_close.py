"""close(): it waits, it drops nothing, and it kills only what has nothing to do."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import assert_state, read, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child
from tests.process.processes import Ends, held, new_process, pid_of, pipe, receive, started

from lastgood.errors import ConfigError, SaveTimeoutError


def is_alive(process: Any) -> bool:
    return bool(process.process.processes[0].is_alive())


def test_hazard_02_close_waits_for_every_queued_save(tmp_path: Path) -> None:
    pending: Future[Any] = Future()
    process = new_process()
    with held(state_of(0)) as first:
        futures = [process.write(first.snapshot, str(tmp_path / "0")), process.write(pending, str(tmp_path / "1"))]
        closing = threading.Thread(target=process.close, daemon=True)
        closing.start()
        pending.set_result(state_of(1))
        first.place().complete()
        closing.join(PATIENCE_SECS)
        assert not closing.is_alive()
        for future in futures:
            assert future.result(0) is None
    for number in range(2):
        assert_state(read(tmp_path / str(number)), number)
    assert not is_alive(process)


def test_hazard_02_the_failure_of_the_last_save_can_still_be_seen(tmp_path: Path) -> None:
    """Whoever closes without looking at it is told by what made the saves; close() itself swallows no future."""
    with pipe() as (ours, theirs):
        process = new_process(in_child.gated_writer, {"pipe": theirs})
        future = process.write(state_of(1), str(tmp_path / "a"))
        receive(ours)
        ours.send("fail")
        process.close()
        assert future.failure_was_fetched is False
        assert isinstance(future.unfetched_failure(), OSError)
        assert future.failure_was_fetched is False
        assert isinstance(future.exception(), OSError)
        assert future.failure_was_fetched is True
        assert future.unfetched_failure() is None


def test_close_times_out_and_leaves_the_process_to_finish(tmp_path: Path) -> None:
    with pipe() as (ours, theirs):
        process = new_process(in_child.gated_writer, {"pipe": theirs}, close_timeout_secs=0.3)
        future = process.write(state_of(1), str(tmp_path / "a"))
        receive(ours)
        end = Ends(pid_of(process))
        with pytest.raises(SaveTimeoutError, match=r"were not finished within 0\.3 s") as caught:
            process.close()
        assert str(tmp_path / "a") in str(caught.value)
        assert is_alive(process)
        ours.send("go")
        receive(ours)
        ours.send("go")
        future.result(PATIENCE_SECS)
        assert end.wait()
        process.close()
    assert_state(read(tmp_path / "a"), 1)


def test_close_kills_an_idle_process_that_does_not_leave(tmp_path: Path) -> None:
    process = new_process(in_child.leaves_a_thread_behind, subprocess_shutdown_timeout_secs=0.5)
    process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    process.close()
    assert not is_alive(process)
    assert_state(read(tmp_path / "a"), 1)


def test_a_replaced_join_that_returns_false_makes_close_kill_and_not_raise(tmp_path: Path) -> None:
    process = new_process()
    process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert process.process is not None
    asked: list[float] = []

    def join(timeout: float) -> bool:
        asked.append(timeout)
        return False

    process.process.join = join  # type: ignore[method-assign, assignment]
    process.close()
    assert asked == [60]
    assert not is_alive(process)


def test_close_may_be_called_again_and_ends_all_writing(tmp_path: Path) -> None:
    process = new_process()
    process.close()
    process.close()
    assert not is_alive(process)
    with pytest.raises(ConfigError, match=r"after close\(\)"):
        process.write(state_of(1), str(tmp_path / "a"))


def test_close_leaves_no_descriptors_threads_or_processes(tmp_path: Path) -> None:
    with started() as process:
        process.write(state_of(1), str(tmp_path / "a")).result(PATIENCE_SECS)

    def held_here() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held_here()
    for number in range(3):
        with started() as process:
            process.write(state_of(number), str(tmp_path / "a")).result(PATIENCE_SECS)
            pid = pid_of(process)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    del process
    assert held_here() == before


def test_a_forked_copy_of_the_trainer_touches_nothing(tmp_path: Path) -> None:
    """What a DataLoader worker does when it ends, and what a program does that forks and closes everything."""
    with started() as process:
        reader, writer = os.pipe()
        copy = os.fork()
        if copy == 0:
            try:
                process.close()
                try:
                    process.write(state_of(1), str(tmp_path / "no"))
                except ConfigError:
                    assert process.process is not None
                    process.process.processes[0].kill()
                    del process
                    os.write(writer, b"refused")
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as said:
            assert said.read() == b"refused"
        os.waitpid(copy, 0)
        assert is_alive(process)
        process.write(state_of(2), str(tmp_path / "a")).result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 2)
