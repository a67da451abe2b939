"""The record of jobs under a root: who may publish there."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.barrier_ranks import finished, start
from tests.storage.recording import RecordingFileOps

from lastgood._coordination.calls import hold_epoch, root_of
from lastgood.errors import CorruptCheckpointError, StorageError, SupersededError
from lastgood.format.epoch import EPOCH_NAME, Epoch, check_epoch, publishing, read_epoch, take_epoch
from lastgood.manager.catalog import read_catalog
from lastgood.storage._durable_write import DurableWrite
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.local import LocalStorage


def test_each_job_that_takes_over_has_the_next_number(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path / "root")
    assert read_epoch(storage, root) is None
    assert [take_epoch(storage, root, job, 60) for job in ("a", "b", "c")] == [1, 2, 3]
    assert read_epoch(storage, root) == Epoch(3, "c")
    assert take_epoch(storage, root, "c", 60) == 3
    check_epoch(storage, root, Epoch(3, "c"))
    with pytest.raises(
        SupersededError, match=r"another job has taken over .*number there is 3, this one's is 2.*Stop"
    ) as caught:
        check_epoch(storage, root, Epoch(2, "b"))
    assert caught.value.path == root


def test_of_many_jobs_that_take_over_at_once_each_gets_a_number_of_its_own(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    takings = [start(take_epoch, storage, root, f"job {number}", 60) for number in range(8)]
    assert finished(takings) == [None] * 8
    assert sorted(taking.result() for taking in takings) == list(range(1, 9))
    assert [path.name for path in tmp_path.iterdir()] == [EPOCH_NAME]


def test_the_record_is_durable_before_the_job_goes_on(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    take_epoch(LocalStorage(ops), str(tmp_path), "a", 60)
    names = [name for name in ops.names() if name in ("lock", "fsync", "replace", "fsync_directory", "unlink")]
    assert names[0] == "lock"
    order = [names.index(name) for name in ("fsync", "replace")]
    assert order == sorted(order)
    assert "fsync_directory" in names[names.index("replace") :]
    assert names[-1] == "unlink"  # of the lock


def test_nobody_takes_over_while_somebody_publishes(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    first = Epoch(take_epoch(storage, root, "a", 60), "a")
    with publishing(storage, root, first, 60), publishing(storage, root, first, 60):
        with pytest.raises(StorageError, match=r"has been publishing under .* for 0 s .*End it"):
            take_epoch(storage, root, "b", 0)
        takeover = start(take_epoch, storage, root, "b", 60)
        assert read_epoch(storage, root) == first
    assert takeover.result(60) == 2
    with pytest.raises(SupersededError), publishing(storage, root, first, 60):
        pytest.fail("it may not publish any more")


def test_whoever_publishes_waits_for_a_takeover_and_then_sees_it(tmp_path: Path) -> None:
    root = str(tmp_path)
    taking, go_on = threading.Event(), threading.Event()

    class Slow(LocalStorage):
        def begin(self, path: str, size: int) -> DurableWrite:
            taking.set()
            assert go_on.wait(60)
            return super().begin(path, size)

    storage = LocalStorage()
    first = Epoch(take_epoch(storage, root, "a", 60), "a")
    takeover = start(take_epoch, Slow(), root, "b", 60)
    assert taking.wait(60)
    with pytest.raises(StorageError, match="taking over or publishing"), publishing(storage, root, first, 0):
        pytest.fail("somebody is taking over")
    go_on.set()
    takeover.result(60)
    with pytest.raises(SupersededError), publishing(storage, root, first, 60):
        pytest.fail("it may not publish any more")


def test_a_takeover_given_up_for_a_slow_disk_does_not_come_back_over_a_later_one(tmp_path: Path) -> None:
    """Its lock is free again by then."""
    ops, root = RecordingFileOps(), str(tmp_path)
    go_on = threading.Event()
    late: list[threading.Thread] = []

    def slow(real: Callable[..., Any], *arguments: Any) -> None:
        late.append(threading.current_thread())
        assert go_on.wait(60)
        real(*arguments)

    ops.replace_call("fsync", slow)
    with pytest.raises(StorageError, match=r"did not answer within 0\.2 s"):
        take_epoch(StorageInTime(LocalStorage(ops), 0.2), root, "a", 60)
    assert take_epoch(LocalStorage(), root, "b", 60) == 1
    go_on.set()
    for thread in late:
        thread.join(60)
    assert read_epoch(LocalStorage(), root) == Epoch(1, "b")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", None])
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path, damage: bytes | None) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    take_epoch(storage, root, "a", 60)
    record = tmp_path / EPOCH_NAME
    record.write_bytes(record.read_bytes().replace(b'"epoch":1', b'"epoch":2') if damage is None else damage)
    with pytest.raises(CorruptCheckpointError, match=r"Make sure that no other job saves there, and delete it"):
        take_epoch(storage, root, "b", 60)
    record.unlink()
    # A record that somebody has removed names nobody else.
    check_epoch(storage, root, Epoch(1, "a"))
    assert take_epoch(storage, root, "b", 60) == 1


def test_a_job_takes_a_root_once_and_never_again(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    mine = hold_epoch(storage, root, "mine", 60, look=True)
    assert hold_epoch(storage, f"{root}/../{tmp_path.name}", "mine", 60, look=True) is mine
    take_epoch(storage, root, "theirs", 60)
    assert hold_epoch(storage, root, "mine", 60, look=False) is mine
    with pytest.raises(SupersededError):
        hold_epoch(storage, root, "mine", 60, look=True)
    assert read_epoch(storage, root) == Epoch(2, "theirs")


@pytest.mark.parametrize(
    ("path", "root"), [("/run/step-1", "/run"), ("/run/step-1/", "/run"), ("run/step-1", "run"), ("step-1", "")]
)
def test_the_root_is_the_directory_that_the_checkpoint_stands_in(path: str, root: str) -> None:
    assert root_of(path) == root


def test_a_checkpoint_in_the_working_directory_has_a_root_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert take_epoch(LocalStorage(), "", "a", 60) == 1
    assert (tmp_path / EPOCH_NAME).exists()


def test_the_catalog_of_a_run_does_not_show_it(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    with publishing(storage, root, Epoch(take_epoch(storage, root, "a", 60), "a"), 60):
        catalog = read_catalog(storage, root)
    assert (catalog.entries, catalog.others) == ((), ())
