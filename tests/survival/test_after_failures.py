"""Hazards 1, 2, 3 and 5 with the whole checkpointer: what becomes of the saves after one that failed."""

import errno
import gc
import logging
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import start
from tests.helpers.disks import seen_by
from tests.helpers.saves import assert_state, commit_together, contents, read, state_of, temporaries
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.process import in_child
from tests.process.processes import pipe, receive
from tests.survival.traces import ProcessEnd, names
from tests.survival.trainers import ELEMENTS, process_of, save_to_full_disk, save_to_read_only_disk

from lastgood import _events
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import CheckpointExistsError, CheckpointProcessError, ConfigError, SaveTimeoutError, StorageError
from lastgood.staging import CheckpointStagerConfig


class Gated:
    """A checkpointer whose process goes through the hooks of each write when it is told to."""

    def __init__(self, checkpointer: AsyncCheckpointer, gate: Connection) -> None:
        self.checkpointer = checkpointer
        self.gate = gate

    @property
    def pid(self) -> int:
        return process_of(self.checkpointer)

    def save(self, path: Path, number: int) -> "tuple[Future[None], Future[None]]":
        """Staged when this returns."""
        staged, written = self.checkpointer.save(str(path), state_of(number))
        staged.result(PATIENCE_SECS)
        return staged, written

    def let_write(self, path: Path) -> None:
        """The next write has to be that to ``path``."""
        for place in ("pre_commit", "post_commit"):
            assert receive(self.gate)[:2] == (place, str(path))
            self.gate.send("go")

    def save_whole(self, path: Path, number: int) -> None:
        _, written = self.save(path, number)
        self.let_write(path)
        written.result(PATIENCE_SECS)


@contextmanager
def gated(*, snapshots_in_flight: int = 1, slot_timeout_secs: float = 600, **process: Any) -> Iterator[Gated]:
    staging = CheckpointStagerConfig(snapshots_in_flight=snapshots_in_flight, slot_timeout_secs=slot_timeout_secs)
    config = CheckpointerConfig(staging_config=staging, process_config=CheckpointProcessConfig(**process))
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            config, checkpoint_writer_init_fn=in_child.gated_writer, checkpoint_writer_init_args={"pipe": theirs}
        )
        try:
            yield Gated(checkpointer, ours)
        finally:
            # Also after a failed test: a checkpointer that waits for its gate would wait when pytest exits.
            ours.close()
            theirs.close()
            try:
                checkpointer.close()
            except (StorageError, CheckpointProcessError, SaveTimeoutError):
                pytest.fail("a failure was left to close()")


@contextmanager
def phases() -> Iterator[list[str]]:
    """Those that end in the block, of this process and of those that it hears of."""
    found: list[str] = []
    unsubscribe = _events.subscribe(lambda event: found.append(event.phase))
    yield found
    unsubscribe()


# Ways to fail: each returns the futures of a save that has failed, asked by nobody.


def by_a_hook(with_gate: Gated, directory: Path) -> "tuple[Future[None], Future[None]]":
    futures = with_gate.save(directory / "bad", 9)
    receive(with_gate.gate)
    with_gate.gate.send("fail")
    wait(futures, PATIENCE_SECS)
    return futures


def by_what_is_in_the_way(with_gate: Gated, directory: Path) -> "tuple[Future[None], Future[None]]":
    (directory / "bad").touch()
    futures = with_gate.save(directory / "bad", 9)
    wait(futures, PATIENCE_SECS)
    return futures


def by_death(with_gate: Gated, directory: Path) -> "tuple[Future[None], Future[None]]":
    futures = with_gate.save(directory / "bad", 9)
    receive(with_gate.gate)
    os.kill(with_gate.pid, signal.SIGKILL)
    wait(futures, PATIENCE_SECS)
    return futures


Failing = Callable[[Gated, Path], "tuple[Future[None], Future[None]]"]
WAYS = pytest.mark.parametrize(
    ("fail", "error"),
    [(by_a_hook, StorageError), (by_what_is_in_the_way, StorageError), (by_death, CheckpointProcessError)],
    ids=["by a hook", "by what is in the way", "by death"],
)


@WAYS
def test_hazard_01_an_unfetched_failure_is_raised_by_the_next_save_and_the_one_after_goes_ahead(
    tmp_path: Path, fail: Failing, error: type[Exception]
) -> None:
    with gated() as with_gate:
        with_gate.save_whole(tmp_path / "a", 1)
        before, pid = contents(tmp_path / "a"), with_gate.pid
        _, written = fail(with_gate, tmp_path)
        with phases() as seen, pytest.raises(error) as caught:
            with_gate.checkpointer.save(str(tmp_path / "b"), state_of(2))
        assert seen == ["stall"]  # nothing was staged
        assert written.exception(0) is caught.value
        assert not (tmp_path / "b").exists()
        with_gate.save_whole(tmp_path / "b", 3)
        with_gate.save_whole(tmp_path / "a", 4)
        assert (with_gate.pid == pid) == (error is StorageError)  # a process that can, lives on
        with_gate.checkpointer.close()
        assert before.keys() == contents(tmp_path / "a").keys()
    assert_state(read(tmp_path / "b"), 3)
    assert_state(read(tmp_path / "a"), 4)


@pytest.mark.parametrize("fetch", [methodcaller("exception"), methodcaller("result")], ids=["exception()", "result()"])
@WAYS
def test_hazard_01_a_failure_that_was_fetched_is_not_raised_again(
    tmp_path: Path, fail: Failing, error: type[Exception], fetch: Callable[["Future[None]"], object]
) -> None:
    with gated() as with_gate:
        staged, written = fail(with_gate, tmp_path)
        assert staged.result(0) is None
        try:
            failure = fetch(written)
        except error as raised:
            failure = raised
        assert isinstance(failure, error)
        with_gate.save_whole(tmp_path / "a", 1)
        with_gate.checkpointer.close()
    assert_state(read(tmp_path / "a"), 1)


@WAYS
def test_hazard_02_close_raises_an_unfetched_failure_once_and_has_closed_everything(
    tmp_path: Path, fail: Failing, error: type[Exception]
) -> None:
    with gated() as with_gate:
        with_gate.save_whole(tmp_path / "a", 1)
        with ProcessEnd(with_gate.pid) as end:
            fail(with_gate, tmp_path)
            with pytest.raises(error):
                with_gate.checkpointer.close()
            assert end.wait(0)
        with_gate.checkpointer.close()
        with pytest.raises(ConfigError, match="closed"):
            with_gate.checkpointer.save(str(tmp_path / "a"), state_of(2))
    assert_state(read(tmp_path / "a"), 1)


def test_hazard_02_of_several_unfetched_failures_the_first_is_raised_and_the_others_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gated(snapshots_in_flight=2) as with_gate:
        futures = [with_gate.save(tmp_path / name, 1)[1] for name in ("first", "second")]
        for name in ("first", "second"):
            assert receive(with_gate.gate)[1] == str(tmp_path / name)
            with_gate.gate.send("fail")
        wait(futures, PATIENCE_SECS)
        with caplog.at_level(logging.ERROR, "lastgood"), pytest.raises(StorageError) as caught:
            with_gate.checkpointer.close()
        assert caught.value.path == str(tmp_path / "first")
        assert [record.message for record in caplog.records] == [
            "another save failed, too: the disk is full of bees"  # that of the second
        ]


def test_saves_land_in_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    """One path: what stands there in the end is the last."""
    with gated(snapshots_in_flight=3) as with_gate:
        futures = [with_gate.save(tmp_path / "a", number)[1] for number in range(3)]
        for number in range(3):
            assert [future.done() for future in futures[number:]] == [False] * (3 - number)
            with_gate.let_write(tmp_path / "a")
            futures[number].result(PATIENCE_SECS)
            assert_state(read(tmp_path / "a"), number)
        assert names(tmp_path / "a") == ["checkpoint_0.pt"]


def test_hazard_02_close_drains_the_queue(tmp_path: Path) -> None:
    with gated(snapshots_in_flight=3) as with_gate:
        futures = [with_gate.save(tmp_path / str(number), number)[1] for number in range(3)]
        with ProcessEnd(with_gate.pid) as end:
            closing = start(with_gate.checkpointer.close)
            for number in range(3):
                with_gate.let_write(tmp_path / str(number))
            closing.result(PATIENCE_SECS)
            assert end.wait(0)
        assert [future.result(0) for future in futures] == [None] * 3
    for number in range(3):
        assert_state(read(tmp_path / str(number)), number)


def test_hazard_03_saves_wait_for_a_stopped_process_in_vain_only_until_the_time_out(tmp_path: Path) -> None:
    with gated(snapshots_in_flight=2, slot_timeout_secs=0.3) as with_gate:
        with ProcessEnd(with_gate.pid) as end:
            end.send_signal(signal.SIGSTOP)
            futures = [with_gate.save(tmp_path / name, number) for number, name in enumerate(("a", "b"))]
            for _ in range(2):
                with (
                    phases() as seen,
                    pytest.raises(SaveTimeoutError, match=r"waited 0\.3 s for that to .*/a ") as late,
                ):
                    with_gate.checkpointer.save(str(tmp_path / "c"), state_of(2))
                assert "take" not in seen
                assert late.value.path == str(tmp_path / "c")
            end.send_signal(signal.SIGCONT)
        for name, (_, written) in zip(("a", "b"), futures, strict=True):
            with_gate.let_write(tmp_path / name)
            written.result(PATIENCE_SECS)
        with_gate.save_whole(tmp_path / "c", 2)
    for number, name in enumerate(("a", "b", "c")):
        assert_state(read(tmp_path / name), number)


def test_hazard_03_close_waits_for_a_stopped_process_until_the_time_out_and_leaves_it_to_finish(tmp_path: Path) -> None:
    with gated(snapshots_in_flight=2, close_timeout_secs=0.3) as with_gate, ProcessEnd(with_gate.pid) as end:
        end.send_signal(signal.SIGSTOP)
        futures = [with_gate.save(tmp_path / name, number)[1] for number, name in enumerate(("a", "b"))]
        with pytest.raises(SaveTimeoutError, match="not finished within"):
            with_gate.checkpointer.close()
        assert not end.wait(0)
        end.send_signal(signal.SIGCONT)
        for name, written in zip(("a", "b"), futures, strict=True):
            with_gate.let_write(tmp_path / name)
            written.result(PATIENCE_SECS)
        assert end.wait()
    for number, name in enumerate(("a", "b")):
        assert_state(read(tmp_path / name), number)


def test_a_process_killed_between_saves_is_not_even_noticed(tmp_path: Path) -> None:
    with gated() as with_gate:
        with_gate.save_whole(tmp_path / "a", 1)
        with ProcessEnd(with_gate.pid) as end:
            end.send_signal(signal.SIGKILL)
            assert end.wait()
            with_gate.save_whole(tmp_path / "a", 2)
            assert with_gate.pid != end.pid
    assert_state(read(tmp_path / "a"), 2)


def test_hazard_05_a_process_killed_in_mid_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with gated() as with_gate:
        with_gate.save_whole(path, 1)
        _, written = with_gate.save(path, 2)
        receive(with_gate.gate)
        os.kill(with_gate.pid, signal.SIGKILL)
        with pytest.raises(CheckpointProcessError, match="Child process terminated unexpectedly"):
            written.result(PATIENCE_SECS)
        assert_state(read(path), 1)
        assert len(temporaries(path)) == 1
        with_gate.save_whole(path, 3)
    assert_state(read(path), 3)
    assert names(path) == ["checkpoint_0.pt"]


def test_a_save_onto_a_checkpoint_of_several_ranks_is_refused_before_anything_is_staged(tmp_path: Path) -> None:
    assert commit_together(tmp_path / "ranks", 1) == [None, None]
    before = contents(tmp_path)
    checkpointer = make_async_checkpointer()
    with phases() as seen, pytest.raises(CheckpointExistsError, match="committed checkpoint of several ranks"):
        checkpointer.save(str(tmp_path / "ranks"), state_of(2))
    assert seen == ["stall"]
    checkpointer.save(str(tmp_path / "a"), state_of(3))[1].result(PATIENCE_SECS)
    checkpointer.close()
    assert_state(read(tmp_path / "a"), 3)
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before


def test_the_users_tensors_are_let_go_of_once_they_are_staged(tmp_path: Path) -> None:
    """They are not held until they are written: that could be one more copy of the state."""
    with gated() as with_gate:
        for number in range(2):  # the plan is made for the first, and found again for the second
            state = state_of(number, ELEMENTS)
            tensors = [weakref.ref(tensor) for tensor in state["model"].values()]
            staged, written = with_gate.checkpointer.save(str(tmp_path / "a"), state)
            staged.result(PATIENCE_SECS)
            del state
            gc.collect()
            assert [tensor() for tensor in tensors] == [None, None]
            assert not written.done()
            with_gate.let_write(tmp_path / "a")
            written.result(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 1, ELEMENTS)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


@pytest.mark.parametrize(
    ("scenario", "number"), [(save_to_full_disk, errno.ENOSPC), (save_to_read_only_disk, errno.EROFS)]
)
def test_hazard_05_and_15_a_disk_that_takes_no_more_fails_that_save_and_spoils_nothing(
    worker: Worker, tmp_path: Path, scenario: Any, number: int
) -> None:
    seen = seen_by(worker, scenario, tmp_path)
    assert isinstance(seen["raised by the next"], StorageError)
    assert seen["raised by the next"].errno == number
    assert any("In the checkpoint process" in note for note in seen["raised by the next"].__notes__)
    assert seen["meanwhile"] == (["checkpoint_0.pt"], 1)
    assert seen["in the end"] == (["checkpoint_0.pt"], 4)
    assert seen["is the same process"]


def test_a_signal_handler_that_saves_in_the_middle_of_a_save_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    """The handler is called in the thread that saves; it stands here for one of SIGTERM."""
    refused: list[BaseException] = []

    def from_a_handler(path: str) -> None:
        for call in (lambda: checkpointer.save(str(tmp_path / "b"), state_of(2)), checkpointer.close):
            try:
                call()
            except ConfigError as error:
                refused.append(error)

    checkpointer = make_async_checkpointer()
    checkpointer._may_write = from_a_handler
    _, written = checkpointer.save(str(tmp_path / "a"), state_of(1))
    written.result(PATIENCE_SECS)
    assert len(refused) == 2
    assert "set a flag there" in str(refused[0])
    checkpointer.close()
    assert_state(read(tmp_path / "a"), 1)


def test_a_checkpointer_that_nobody_has_any_more_lets_its_process_leave(tmp_path: Path) -> None:
    checkpointer = make_async_checkpointer()
    checkpointer.save(str(tmp_path / "a"), state_of(1))[1].result(PATIENCE_SECS)
    process = checkpointer._checkpoint_process.process
    assert process is not None
    del checkpointer
    gc.collect()
    assert process.join(PATIENCE_SECS)
    assert_state(read(tmp_path / "a"), 1)
