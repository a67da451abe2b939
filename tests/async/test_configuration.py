"""Hazard 16: every part of the configuration of an asynchronous checkpointer has its effect."""

import contextlib
import ctypes
import dataclasses
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.barrier_ranks import store_arguments
from tests.helpers.asynchronous import ELEMENTS, Gate, arenas_open, state_of_large_tensors
from tests.helpers.saves import assert_state, state_of
from tests.helpers.workers import PATIENCE_SECS
from tests.process import in_child
from tests.process.processes import Ends, pid_of, pipe, receive
from tests.unit.test_builder import FIELDS as WRITERS_FIELDS
from torch.optim import optimizer as torch_optimizer

from lastgood.barriers import BarrierConfig, TCPStoreBarrier
from lastgood.builder import make_async_checkpointer
from lastgood.checkpoint_process import CheckpointProcessConfig
from lastgood.checkpoint_writer import CheckpointWriterConfig
from lastgood.checkpointer import AsyncCheckpointer
from lastgood.config import CheckpointerConfig
from lastgood.errors import CheckpointProcessError, ConfigError, SaveTimeoutError, StagingError, TornSnapshotError
from lastgood.staging import CheckpointStagerConfig
from lastgood.types import RankInfo

IOPRIO_GET = {"x86_64": 252, "aarch64": 31}
LOWEST_PRIORITY = (2 << 13) | 7


@contextlib.contextmanager
def staging(**fields: Any) -> Iterator[AsyncCheckpointer]:
    config = CheckpointerConfig(staging_config=CheckpointStagerConfig(**fields))
    checkpointer = make_async_checkpointer(config, RankInfo(0, 1))
    try:
        yield checkpointer
    finally:
        checkpointer.close()


@contextlib.contextmanager
def gated(**configs: Any) -> Iterator[tuple[AsyncCheckpointer, Connection]]:
    """A checkpointer whose writer stops before and after each commit, until it is told to go on."""
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            CheckpointerConfig(**configs),
            RankInfo(0, 1),
            checkpoint_writer_init_fn=in_child.gated_writer,
            checkpoint_writer_init_args={"pipe": theirs},
        )
        theirs.close()
        yield checkpointer, ours


def let_pass(gate: Connection, saves: int) -> None:
    for _ in range(2 * saves):
        receive(gate)
        gate.send("go on")


# Staging


def check_use_pinned_memory(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[int] = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            registered.append(size)
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    for wanted in (True, False):
        registered.clear()
        with staging(use_pinned_memory=wanted, use_non_blocking_copy=False) as checkpointer:
            checkpointer.save(str(path), state_of(1))[1].result(PATIENCE_SECS)
        assert bool(registered) is wanted


def check_use_shared_memory(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    # For compatibility: an arena is shared memory, or nobody could write it.
    before = arenas_open()
    for wanted in (True, False):
        with staging(use_shared_memory=wanted) as checkpointer:
            checkpointer.save(str(path), state_of(1))[1].result(PATIENCE_SECS)
            assert arenas_open() == before + 1


def check_use_async_staging(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = gate.pass_by
    monkeypatch.setattr(gate, "pass_by", lambda: (threads.append(threading.current_thread().name), real())[1])
    with staging(use_async_staging=False) as checkpointer:
        staged, written = checkpointer.save(str(path), state_of_large_tensors(1))
        assert staged.done()
        assert len(threads) == 2
        assert "lastgood-staging" not in {thread.name for thread in threading.enumerate()}
        written.result(PATIENCE_SECS)
    with staging(use_async_staging=True) as checkpointer:
        gate.shut()
        staged, written = checkpointer.save(str(path), state_of_large_tensors(1))
        assert not staged.done()
        gate.open()
        written.result(PATIENCE_SECS)


def check_use_non_blocking_copy(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    # tests/async/test_device_copies.py shows what it does where there is an accelerator.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="use_non_blocking_copy"):
        make_async_checkpointer(CheckpointerConfig(staging_config=CheckpointStagerConfig(use_non_blocking_copy=True)))


def check_snapshots_in_flight(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (1, 3):
        config = CheckpointStagerConfig(snapshots_in_flight=allowed, slot_timeout_secs=0.2)
        with gated(staging_config=config) as (checkpointer, writer):
            for number in range(allowed):
                checkpointer.save(str(path / str(number)), state_of(number))
            with pytest.raises(SaveTimeoutError):
                checkpointer.save(str(path / "more"), state_of(9))
            let_pass(writer, allowed)
            checkpointer.close()
            for number in range(allowed):
                assert_state(checkpointer.load(str(path / str(number))), number)
    with pytest.raises(ConfigError, match="snapshots_in_flight"):
        make_async_checkpointer(CheckpointerConfig(staging_config=CheckpointStagerConfig(snapshots_in_flight=0)))


def check_slot_timeout_secs(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(staging_config=CheckpointStagerConfig(slot_timeout_secs=0.3)) as (checkpointer, writer):
        _, written = checkpointer.save(str(path / "a"), state_of(1))
        with pytest.raises(SaveTimeoutError, match=r"0\.3 s") as caught:
            checkpointer.save(str(path / "b"), state_of(2))
        assert caught.value.path == str(path / "b")
        let_pass(writer, 1)
        written.result(PATIENCE_SECS)
        _, written = checkpointer.save(str(path / "b"), state_of(2))
        let_pass(writer, 1)
        written.result(PATIENCE_SECS)
        checkpointer.close()


def check_staging_timeout_secs(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with staging(staging_timeout_secs=0.3) as checkpointer:
        gate.shut()
        staged, written = checkpointer.save(str(path), state_of_large_tensors(1))
        for future in (staged, written):
            with pytest.raises(StagingError, match=r"0\.3 s"):
                future.result(PATIENCE_SECS)
        gate.open()


def check_hold_optimizers(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = torch_optimizer._global_optimizer_pre_hooks
    before = len(hooks)
    for wanted in (True, False):
        with staging(hold_optimizers=wanted) as checkpointer:
            checkpointer.save(str(path), state_of(1))[1].result(PATIENCE_SECS)
            assert len(hooks) == before + wanted


def check_full_check(path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    with staging(full_check=True) as checkpointer:
        state = {"a": torch.zeros(100 * ELEMENTS)}
        gate.shut()
        _, written = checkpointer.save(str(path), state)
        state["a"].numpy()[12_345] = 1
        gate.open()
        assert isinstance(written.exception(PATIENCE_SECS), TornSnapshotError)


STAGING_FIELDS = {
    "use_pinned_memory": check_use_pinned_memory,
    "use_shared_memory": check_use_shared_memory,
    "use_async_staging": check_use_async_staging,
    "use_non_blocking_copy": check_use_non_blocking_copy,
    "snapshots_in_flight": check_snapshots_in_flight,
    "slot_timeout_secs": check_slot_timeout_secs,
    "staging_timeout_secs": check_staging_timeout_secs,
    "hold_optimizers": check_hold_optimizers,
    "full_check": check_full_check,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CheckpointStagerConfig)])
def test_hazard_16_every_field_of_the_stagers_configuration_arrives(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    STAGING_FIELDS[field](tmp_path, gate, monkeypatch)


@pytest.mark.parametrize("name", ["slot_timeout_secs", "staging_timeout_secs"])
@pytest.mark.parametrize("secs", [0, -1.0, float("nan")])
def test_times_that_cannot_be_are_refused(name: str, secs: float) -> None:
    config = CheckpointerConfig(staging_config=CheckpointStagerConfig(**{name: secs}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        make_async_checkpointer(config)


# The process


def started(init: Callable[..., Any] = in_child.nothing, **fields: Any) -> AsyncCheckpointer:
    config = CheckpointerConfig(process_config=CheckpointProcessConfig(**fields))
    return make_async_checkpointer(config, RankInfo(0, 1), init)


def child_of(checkpointer: AsyncCheckpointer) -> int:
    process = checkpointer._checkpoint_process
    process.process_creation_future.result(PATIENCE_SECS)
    return pid_of(process)


def check_subprocess_init_timeout_secs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = started(in_child.start_never, subprocess_init_timeout_secs=0.3)
    with pytest.raises(TimeoutError, match=r"Timed out after 0\.3 s"):
        checkpointer._checkpoint_process.process_creation_future.result(PATIENCE_SECS)
    checkpointer.close()


def check_subprocess_shutdown_timeout_secs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CheckpointerConfig(process_config=CheckpointProcessConfig(subprocess_shutdown_timeout_secs=0.3))
    checkpointer = make_async_checkpointer(
        config, RankInfo(0, 1), checkpoint_writer_init_fn=in_child.leaves_a_thread_behind
    )
    ends = Ends(child_of(checkpointer))
    with caplog.at_level(logging.WARNING, "lastgood"):
        checkpointer.close()
    assert ends.wait()
    assert "did not leave within 0.3 s" in caplog.text


def check_no_progress_timeout_secs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = started(no_progress_timeout_secs=0.5)
    os.kill(child_of(checkpointer), signal.SIGSTOP)
    _, written = checkpointer.save(str(path), state_of(1))
    with pytest.raises(CheckpointProcessError, match=r"0\.5 s"):
        written.result(PATIENCE_SECS)
    checkpointer.close()


def check_close_timeout_secs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with gated(process_config=CheckpointProcessConfig(close_timeout_secs=0.3)) as (checkpointer, writer):
        ends = Ends(child_of(checkpointer))
        checkpointer.save(str(path), state_of(1))
        receive(writer)
        with pytest.raises(SaveTimeoutError, match=r"0\.3 s"):
            checkpointer.close()
        writer.send("go on")
        let_pass_last(writer)
        assert ends.wait()
    assert_state(checkpointer.load(str(path)), 1)


def let_pass_last(writer: Connection) -> None:
    receive(writer)
    writer.send("go on")


def check_nice(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for added in (0, 7):
        checkpointer = started(nice=added)
        assert os.getpriority(os.PRIO_PROCESS, child_of(checkpointer)) == min(19, ours + added)
        checkpointer.close()


def check_low_io_priority(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    number = IOPRIO_GET.get(platform.machine())
    if number is None:
        pytest.skip("the number of the system call is not known here")
    for wanted in (True, False):
        checkpointer = started(low_io_priority=wanted)
        found = ctypes.CDLL(None).syscall(number, 1, child_of(checkpointer))
        assert (found == LOWEST_PRIORITY) is wanted
        checkpointer.close()


PROCESS_FIELDS = {
    "subprocess_init_timeout_secs": check_subprocess_init_timeout_secs,
    "subprocess_shutdown_timeout_secs": check_subprocess_shutdown_timeout_secs,
    "no_progress_timeout_secs": check_no_progress_timeout_secs,
    "close_timeout_secs": check_close_timeout_secs,
    "nice": check_nice,
    "low_io_priority": check_low_io_priority,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CheckpointProcessConfig)])
def test_hazard_16_every_field_of_the_processs_configuration_arrives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    PROCESS_FIELDS[field](tmp_path, caplog)


# What the writer is made of


def test_hazard_16_a_writer_of_the_users_own_gets_what_its_function_names() -> None:
    store = store_arguments(2, 3, 1)
    config = CheckpointerConfig(
        CheckpointWriterConfig(write_barrier_timeout_secs=17, no_progress_timeout_secs=23.0),
        BarrierConfig("tcp_store", store),
    )
    for function in (in_child.noting_writer, names_everything):
        with pipe() as (ours, theirs):
            checkpointer = make_async_checkpointer(
                config,
                RankInfo(2, 3),
                checkpoint_writer_init_fn=function,
                checkpoint_writer_init_args={"pipe": theirs, "mine": 5},
            )
            try:
                rank_info, writer_config, more = receive(ours)
            finally:
                checkpointer.close()
        assert rank_info == RankInfo(2, 3)
        assert writer_config == config.writer_config
        assert more["mine"] == 5
        if function is names_everything:
            assert more == {"mine": 5, "barrier_class": TCPStoreBarrier, "barrier_args": store}


def names_everything(
    pipe: Connection,
    config: CheckpointWriterConfig,
    rank_info: RankInfo,
    barrier_class: Any,
    barrier_args: dict[str, Any],
    mine: int,
) -> Any:
    return in_child.noting_writer(
        pipe, rank_info, config, mine=mine, barrier_class=barrier_class, barrier_args=barrier_args
    )


def test_hazard_16_what_the_user_gives_comes_before_what_the_configuration_says() -> None:
    own = CheckpointWriterConfig(write_barrier_timeout_secs=99)
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            CheckpointerConfig(),
            RankInfo(0, 1),
            checkpoint_writer_init_fn=in_child.noting_writer,
            checkpoint_writer_init_args={"pipe": theirs, "config": own, "rank_info": RankInfo(1, 2)},
        )
        try:
            assert receive(ours)[:2] == (RankInfo(1, 2), own)
        finally:
            checkpointer.close()


def test_hazard_16_the_subprocess_is_prepared_with_its_arguments(tmp_path: Path) -> None:
    checkpointer = make_async_checkpointer(
        CheckpointerConfig(), RankInfo(0, 1), in_child.note_start, (str(tmp_path / "note"),)
    )
    child = child_of(checkpointer)
    assert (tmp_path / "note").read_text().split()[:2] == [str(os.getpid()), str(child)]
    checkpointer.close()


def test_hazard_16_the_writers_configuration_counts_in_the_process(tmp_path: Path) -> None:
    assert set(WRITERS_FIELDS) == {field.name for field in dataclasses.fields(CheckpointWriterConfig)}
    config = CheckpointerConfig(CheckpointWriterConfig(write_barrier_timeout_secs=-3))
    checkpointer = make_async_checkpointer(config, RankInfo(0, 1))
    with pytest.raises(RuntimeError, match="write_barrier_timeout_secs is -3"):
        checkpointer._checkpoint_process.process_creation_future.result(PATIENCE_SECS)
    checkpointer.close()


def test_hazard_16_rank_and_arguments_arrive(tmp_path: Path) -> None:
    with pipe() as (ours, theirs):
        checkpointer = make_async_checkpointer(
            CheckpointerConfig(),
            RankInfo(2, 3),
            checkpoint_writer_init_fn=in_child.noting_writer,
            checkpoint_writer_init_args={"pipe": theirs},
        )
        try:
            checkpointer.save(str(tmp_path), state_of(1), epoch=4)[1].result(PATIENCE_SECS)
            receive(ours)
            assert receive(ours) == ("pre_commit", str(tmp_path), {"epoch": 4})
            assert receive(ours) == ("post_commit", str(tmp_path), {"epoch": 4})
            assert_state(checkpointer.load(str(tmp_path)), 1)
        finally:
            checkpointer.close()
    assert os.listdir(tmp_path) == ["checkpoint_2.pt"]


def test_dist_barrier_cannot_work_in_another_process() -> None:
    with pytest.raises(ConfigError, match="tcp_store"):
        make_async_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("dist_barrier")))
