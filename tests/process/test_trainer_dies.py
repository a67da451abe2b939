"""The trainer dies, in every way that there is: what was wholly staged lands, and nothing is left behind."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.saves import assert_state, read, state_of, temporaries
from tests.helpers.workers import PATIENCE_SECS, Worker
from tests.process import in_child
from tests.process.processes import Ends, HeldSnapshot, new_process, pid_of, pipe, receive

from lastgood._process import child_process, link
from lastgood.staging import CheckpointStagerConfig, DefaultStager

RUNS = 5


def stage_and_tell(trainer: Connection, path: str, number: int) -> None:
    """Save with a process that is just being started; say so as soon as all is staged."""
    process = new_process()
    stager = DefaultStager()
    future = stager.stage(state_of(number, 3_000_000))
    process.write(future, path)  # type: ignore[arg-type]
    future.exception(PATIENCE_SECS)  # type: ignore[union-attr]
    trainer.send(pid_of(process))
    threading.Event().wait()


@contextmanager
def trainer(function: Callable[..., Any], *arguments: Any) -> Iterator[Worker]:
    worker = Worker()
    try:
        worker.start(function, *arguments, with_pipe=True)
        yield worker
    finally:
        worker.kill()


def no_traces(path: Path, checkpoint: str = "checkpoint_0.pt") -> None:
    assert temporaries(path) == []
    assert (path / checkpoint).exists()


@pytest.mark.parametrize("run", range(RUNS))
def test_hazard_04_sigkill_right_after_staging_loses_nothing(tmp_path: Path, run: int) -> None:
    """The process may not even be ready then."""
    with trainer(stage_and_tell, str(tmp_path / "a"), run) as worker:
        end = Ends(worker.receive())
        worker.kill()
        assert end.wait()
    assert_state(read(tmp_path / "a"), run, 3_000_000)
    no_traces(tmp_path / "a")


def save_gated(trainer: Connection, gate: Connection, paths: list[str], incomplete: str | None) -> None:
    """Several saves in the queue, the last of them never wholly staged; the first is being written."""
    process = new_process(in_child.gated_writer, {"pipe": gate})
    process.process_creation_future.result(PATIENCE_SECS)
    stager = DefaultStager(CheckpointStagerConfig(use_async_staging=False, snapshots_in_flight=3))
    for number, path in enumerate(paths):
        process.write(stager.snapshot(state_of(number)), path)
    if incomplete is not None:
        last = HeldSnapshot(state_of(99))
        process.write(last.snapshot, incomplete)
        last.place().advance(4096)
        process.ping()
    trainer.send(pid_of(process))
    threading.Event().wait()


def let_pass(gate: Connection, saves: int) -> list[str]:
    places = []
    for _ in range(2 * saves):
        places.append(receive(gate)[1])
        gate.send("go")
    return places


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_hazard_04_all_that_is_staged_is_finished_in_order_and_the_rest_is_dropped(
    tmp_path: Path, number: signal.Signals
) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    with pipe() as (ours, theirs), trainer(save_gated, theirs, paths, str(tmp_path / "dropped")) as worker:
        end = Ends(worker.receive())
        os.kill(worker.pid, number)
        worker.kill()
        assert let_pass(ours, 2) == [paths[0]] * 2 + [paths[1]] * 2
        assert end.wait()
        assert not ours.poll()
    for index, name in enumerate(("a", "b")):
        assert_state(read(tmp_path / name), index)
        no_traces(tmp_path / name)
    assert not (tmp_path / "dropped" / "checkpoint_0.pt").exists()
    if (tmp_path / "dropped").exists():
        assert temporaries(tmp_path / "dropped") == []


def save_half(trainer: Connection, path: str) -> None:
    process = new_process()
    process.process_creation_future.result(PATIENCE_SECS)
    held = HeldSnapshot(state_of(1))
    process.write(held.snapshot, path)
    held.place().advance(4096)
    process.ping()
    trainer.send(pid_of(process))
    threading.Event().wait()


def test_what_is_being_written_but_not_wholly_staged_is_dropped(tmp_path: Path) -> None:
    with trainer(save_half, str(tmp_path / "a")) as worker:
        end = Ends(worker.receive())
        worker.kill()
        assert end.wait()
    assert not (tmp_path / "a" / "checkpoint_0.pt").exists()
    if (tmp_path / "a").exists():
        assert temporaries(tmp_path / "a") == []


class EndlessLoader:
    """DataLoader workers, forked after the process was started: they hold copies of its pipe."""

    def __init__(self) -> None:
        data = torch.utils.data.TensorDataset(torch.zeros(100_000, 1))
        self.iterator = iter(torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context="fork"))
        next(self.iterator)


def save_with_loader(trainer: Connection, gate: Connection, path: str, has_pidfds: bool = True) -> None:
    os.setpgid(0, 0)
    if not has_pidfds:
        child_process.open_pidfd = link.open_pidfd = lambda pid: None  # type: ignore[attr-defined]
    # Workers of a DataLoader must be this process's to have; those of a daemon may not be.
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    process = new_process(in_child.gated_writer, {"pipe": gate})
    process.process_creation_future.result(PATIENCE_SECS)
    loader = EndlessLoader()
    process.write(state_of(1), path)
    trainer.send((pid_of(process), [worker.pid for worker in loader.iterator._workers]))
    threading.Event().wait()


@pytest.mark.parametrize(
    ("whole_group", "has_pidfds"),
    [(False, True), (True, True), (False, False)],
    ids=["alone", "with its process group", "on an old kernel"],
)
def test_hazard_04_with_data_loader_workers_alive(tmp_path: Path, whole_group: bool, has_pidfds: bool) -> None:
    path = str(tmp_path / "a")
    with pipe() as (ours, theirs), trainer(save_with_loader, theirs, path, has_pidfds) as worker:
        pid, loaders = worker.receive()
        end = Ends(pid)
        assert receive(ours)[0] == "pre_commit"
        if whole_group:
            os.killpg(worker.pid, signal.SIGTERM)
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            for loader in loaders:
                os.kill(loader, signal.SIGSTOP)
            os.kill(worker.pid, signal.SIGKILL)
        ours.send("go")
        assert receive(ours)[0] == "post_commit"
        ours.send("go")
        assert end.wait()
        for loader in loaders:
            if not whole_group:
                os.kill(loader, signal.SIGKILL)
    assert_state(read(tmp_path / "a"), 1)
    no_traces(tmp_path / "a")


def save_custom(trainer: Connection, gate: Connection, path: str) -> None:
    process = new_process(in_child.StateFirst, {"pipe": gate})
    state = {**state_of(1), "shared": torch.ones(5).share_memory_()}
    process.write(state, path)
    trainer.send(pid_of(process))
    threading.Event().wait()


def test_hazard_04_with_a_writer_of_the_users_own(tmp_path: Path) -> None:
    with pipe() as (ours, theirs), trainer(save_custom, theirs, str(tmp_path / "a")) as worker:
        end = Ends(worker.receive())
        worker.kill()
        assert receive(ours) == ("writing", str(tmp_path / "a"))
        ours.send("go")
        assert end.wait()
    found = torch.load(tmp_path / "a" / "custom.pt")["state"]
    assert_state(found, 1)
    assert torch.equal(found["shared"], torch.ones(5))


def save_hanging(trainer: Connection, gate: Connection, path: str) -> None:
    process = new_process(in_child.Hangs, {"pipe": gate}, init=in_child.import_torch, no_progress_timeout_secs=1.0)
    process.write(state_of(1), path)
    threading.Event().wait()


def test_a_process_that_gets_on_no_more_ends_without_its_trainer(tmp_path: Path) -> None:
    with pipe() as (ours, theirs), trainer(save_hanging, theirs, str(tmp_path / "a")) as worker:
        end = Ends(receive(ours))
        worker.kill()
        assert end.wait()


def start_hanging(trainer: Connection) -> None:
    process = new_process(init=in_child.start_never, subprocess_init_timeout_secs=1)
    process.write(state_of(1), "/nowhere")
    trainer.send(pid_of(process))
    threading.Event().wait()


def test_a_process_that_never_gets_ready_ends_without_its_trainer() -> None:
    with trainer(start_hanging) as worker:
        end = Ends(worker.receive())
        worker.kill()
        assert end.wait()


def raise_after_staging(trainer: Connection, path: str) -> None:
    process = new_process()
    stager = DefaultStager()
    future = stager.stage(state_of(1))
    process.write(future, path)  # type: ignore[arg-type]
    future.exception(PATIENCE_SECS)  # type: ignore[union-attr]
    trainer.send(pid_of(process))
    sys.exit(3)


@pytest.mark.filterwarnings("ignore")
def test_hazard_04_an_exception_of_the_trainer_loses_nothing(tmp_path: Path) -> None:
    with trainer(raise_after_staging, str(tmp_path / "a")) as worker:
        end = Ends(worker.receive())
        assert end.wait()
    assert_state(read(tmp_path / "a"), 1)
    no_traces(tmp_path / "a")
