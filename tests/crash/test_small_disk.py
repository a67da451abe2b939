"""A disk that is full, one that is read-only, and a directory that is: real ones."""

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.small_disk import full_disk, read_only_directory, read_only_disk
from tests.helpers.disks import MIB, seen_by
from tests.helpers.saves import save
from tests.helpers.workers import Worker

from lastgood.errors import StorageError


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


def test_hazard_15_a_full_disk_is_an_early_clear_error_and_the_next_save_goes_well(
    worker: Worker, tmp_path: Path
) -> None:
    seen = seen_by(worker, full_disk, tmp_path)
    for attempt in ("too large", "single file"):
        failure = seen[attempt]
        assert isinstance(failure, StorageError)
        assert failure.errno == errno.ENOSPC
        assert "(12.0 MiB) are needed" in str(failure)
        assert f"{seen['free']} bytes" in str(failure)
        assert "untouched" in str(failure)
    assert seen["names"] == ["checkpoint"]
    assert seen["filled"].errno == errno.ENOSPC
    for moment, number in (("after too large", 1), ("after filled", 1), ("after freed", 4)):
        assert seen[moment] == {"names": ["checkpoint_0.pt"], "number": number}, moment
    assert seen["freed"] is None
    assert seen["free"] < 10 * MIB


def test_a_read_only_file_system(worker: Worker, tmp_path: Path) -> None:
    seen = seen_by(worker, read_only_disk, tmp_path)
    assert seen["failure"].errno == errno.EROFS
    assert "mounted read-only" in str(seen["failure"])
    assert (seen["names"], seen["number"]) == (["checkpoint_0.pt"], 1)


def test_a_directory_without_write_permission(worker: Worker) -> None:
    # Not tmp_path: nobody may not even look into that.
    with tempfile.TemporaryDirectory() as directory:
        save(directory, 1)
        Path(directory).chmod(0o555)
        seen = seen_by(worker, read_only_directory, Path(directory))
        Path(directory).chmod(0o755)
    for attempt in ("failure", "single file"):
        assert seen[attempt].errno == errno.EACCES
        assert "permission denied" in str(seen[attempt])
    assert (seen["names"], seen["number"]) == (["checkpoint_0.pt"], 1)
