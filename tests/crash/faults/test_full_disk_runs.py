"""A run whose disk is full, a real one: nothing that was saved is lost, and with room it goes on."""

import errno
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.crash.faults.full_disk import run_on_full_disk
from tests.helpers.disks import seen_by
from tests.helpers.workers import Worker

from lastgood.errors import StorageError


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_hazard_08_and_15_a_full_disk_costs_a_run_no_checkpoint(
    worker: Worker, tmp_path: Path, asynchronous: bool
) -> None:
    seen = seen_by(worker, partial(run_on_full_disk, asynchronous=asynchronous), tmp_path)
    for step, failure in zip((3, 4), seen["failures"], strict=True):
        assert isinstance(failure, StorageError)
        assert failure.errno == errno.ENOSPC
        assert f"step-{step}" in str(failure)
        assert "untouched" in str(failure)
    # Retention removes nothing for saves that have failed, and whoever resumes needs no room.
    assert seen["files while full"] == ["step-1/checkpoint_0.pt", "step-2/checkpoint_0.pt"]
    assert seen["resumed while full"] == (2, 2)
    assert seen["next"] is None
    assert seen["resumed in the end"] == (5, 5)
    assert seen["in the end"] == ["step-2", "step-5"]
    assert seen["files in the end"] == ["step-2/checkpoint_0.pt", "step-5/checkpoint_0.pt"]
