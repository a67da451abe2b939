"""A snapshot on its way from shared memory to storage: what its trainer says of it last decides."""

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.distributed.barrier_ranks import start
from tests.helpers.asynchronous import HEAD, state_of_large_tensors
from tests.helpers.workers import PATIENCE_SECS
from tests.storage.recording import RecordingFileOps

from lastgood._staged_image import StagedImage
from lastgood.errors import TornSnapshotError
from lastgood.staging import CheckpointStagerConfig, DefaultStager
from lastgood.storage.local import LocalStorage


@pytest.fixture
def image(rng_seed: int) -> Iterator[StagedImage]:
    """One whose bytes are all there, and whose trainer has not said so."""
    with DefaultStager(CheckpointStagerConfig(use_async_staging=False)) as stager:
        placement = stager.snapshot(state_of_large_tensors(rng_seed)).placed.result(PATIENCE_SECS)
        memory = memoryview(mmap.mmap(placement.descriptor, placement.arena_size))
        image = StagedImage(memory, placement.description)
        image.advance(image.layout(HEAD).file_size)
        yield image


@pytest.mark.parametrize("is_torn", [True, False])
def test_hazard_11_a_snapshot_found_torn_when_all_of_it_is_written_is_not_published(
    image: StagedImage, tmp_path: Path, is_torn: bool
) -> None:
    ops, is_written = RecordingFileOps(), threading.Event()

    def pwrite(real, descriptor: int, data: memoryview, offset: int) -> int:  # type: ignore[no-untyped-def]
        written = int(real(descriptor, data, offset))
        is_written.set()  # all of it is one piece
        return written

    ops.replace_call("pwrite", pwrite)
    options = {"rank": 0, "no_progress_timeout_secs": PATIENCE_SECS}
    writing = start(lambda: image.write_durably(HEAD, LocalStorage(ops), str(tmp_path / "file"), **options))
    assert is_written.wait(PATIENCE_SECS)
    if is_torn:
        image.fail(TornSnapshotError("changed meanwhile"))
        with pytest.raises(TornSnapshotError):
            writing.result(PATIENCE_SECS)
        assert list(tmp_path.iterdir()) == []
    else:
        image.complete()
        writing.result(PATIENCE_SECS).commit()
        assert [each.name for each in tmp_path.iterdir()] == ["file"]
