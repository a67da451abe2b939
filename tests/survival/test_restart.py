"""A trainer that was started again finds the checkpoint process of its former life still writing to the same path."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import start
from tests.helpers.saves import assert_state, read, save, state_of, temporaries, writer_of
from tests.helpers.workers import PATIENCE_SECS
from tests.process.processes import pipe, receive
from tests.storage.recording import RecordingFileOps
from tests.survival.in_child import tell_that_it_waits
from tests.survival.traces import ProcessEnd, names
from tests.survival.trainers import file_in, save_gated, trainer

import lastgood
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.config import CheckpointerConfig
from lastgood.errors import StorageError


class NewSave:
    """The save of the new trainer: ``wait_until_it_waits`` returns once it has been refused the lock."""

    def __init__(self, written: "Future[None]", wait_until_it_waits: Callable[[], None]) -> None:
        self.written = written
        self.wait_until_it_waits = wait_until_it_waits


@contextmanager
def asynchronous_save(path: Path, number: int, **config: Any) -> Iterator[NewSave]:
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            CheckpointerConfig(writer_config=CheckpointWriterConfig(**config)),
            subprocess_init_fn=tell_that_it_waits,
            subprocess_init_args=(theirs,),
        )
        staged, written = checkpointer.save(str(path), state_of(number))
        staged.result(PATIENCE_SECS)  # it does not wait for anybody to stage

        def wait() -> None:
            assert receive(ours) == "waits"

        yield NewSave(written, wait)
        checkpointer.close()


@contextmanager
def synchronous_save(path: Path, number: int, **config: Any) -> Iterator[NewSave]:
    ops = RecordingFileOps()
    refused = threading.Event()

    def lock(real: Callable[[int], bool], descriptor: int) -> bool:
        is_free = real(descriptor)
        if not is_free:
            refused.set()
        return is_free

    ops.replace_call("lock", lock)
    written = start(writer_of(ops=ops, **config).write, str(path), state_of(number))

    def wait() -> None:
        assert refused.wait(PATIENCE_SECS)

    yield NewSave(written, wait)


BOTH = pytest.mark.parametrize("new_save", [asynchronous_save, synchronous_save])


@contextmanager
def former_process(path: Path, number: int) -> Iterator[tuple[ProcessEnd, Callable[[str], None]]]:
    """The checkpoint process of a trainer that has died; how to wait for its end, and to let it pass a hook."""
    with ExitStack() as stack:
        ours, theirs = stack.enter_context(pipe())
        worker = stack.enter_context(trainer(save_gated, theirs, str(path), number))
        end = stack.enter_context(ProcessEnd(worker.receive().checkpoint_process))
        assert receive(ours)[0] == "pre_commit"
        worker.kill()

        def let_pass(then: str) -> None:
            ours.send("go")
            if then:
                assert receive(ours)[0] == then

        yield end, let_pass


@BOTH
@pytest.mark.parametrize("is_stopped", [False, True], ids=["", "stopped for a while"])
def test_the_new_save_lands_after_that_of_the_former_process(tmp_path: Path, new_save: Any, is_stopped: bool) -> None:
    path = tmp_path / "checkpoint"
    save(path, 0)
    with former_process(path, 1) as (end, let_pass):
        if is_stopped:
            end.send_signal(signal.SIGSTOP)
        with new_save(path, 2) as new:
            new.wait_until_it_waits()
            assert_state(lastgood.load(file_in(path)), 0)
            assert not new.written.done()
            if is_stopped:
                end.send_signal(signal.SIGCONT)
            let_pass("post_commit")
            assert_state(lastgood.load(file_in(path)), 1)
            assert not new.written.done()
            let_pass("")
            new.written.result(PATIENCE_SECS)
            assert end.wait()
    assert_state(lastgood.load(file_in(path)), 2)
    assert names(path) == ["checkpoint_0.pt"]


@BOTH
@pytest.mark.parametrize("is_stopped", [False, True], ids=["", "while stopped"])
def test_the_death_of_the_former_process_frees_its_lock_for_the_new_save(
    tmp_path: Path, new_save: Any, is_stopped: bool
) -> None:
    path = tmp_path / "checkpoint"
    save(path, 0)
    with former_process(path, 1) as (end, _), new_save(path, 2) as new:
        new.wait_until_it_waits()
        if is_stopped:
            end.send_signal(signal.SIGSTOP)
        assert len(temporaries(path)) == 1
        assert_state(lastgood.load(file_in(path)), 0)
        assert not new.written.done()
        end.send_signal(signal.SIGKILL)
        assert end.wait()
        new.written.result(PATIENCE_SECS)
    assert_state(lastgood.load(file_in(path)), 2)
    assert names(path) == ["checkpoint_0.pt"]


@BOTH
def test_a_new_save_gives_up_in_time_and_the_former_one_lands(tmp_path: Path, new_save: Any) -> None:
    path = tmp_path / "checkpoint"
    save(path, 0)
    with former_process(path, 1) as (end, let_pass), new_save(path, 2, no_progress_timeout_secs=0.5) as new:
        with pytest.raises(StorageError, match=r"another process has been writing .* for 0\.5 s") as caught:
            new.written.result(PATIENCE_SECS)
        assert caught.value.phase == "lock"
        assert_state(read(path), 0)
        let_pass("post_commit")
        let_pass("")
        assert end.wait()
    assert_state(lastgood.load(file_in(path)), 1)
    assert names(path) == ["checkpoint_0.pt"]


@BOTH
def test_saves_to_other_paths_do_not_wait(tmp_path: Path, new_save: Any) -> None:
    with former_process(tmp_path / "step-1", 1) as (end, let_pass):
        with new_save(tmp_path / "step-2", 2) as new:
            new.written.result(PATIENCE_SECS)
        let_pass("post_commit")
        let_pass("")
        assert end.wait()
    for number in (1, 2):
        assert_state(read(tmp_path / f"step-{number}"), number)
