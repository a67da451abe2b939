"""Storage that hangs: every call is given up in time, and nothing is left behind when it comes back after all."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.saves import assert_state, contents, read, save, state_of, temporaries
from tests.storage.recording import RecordingFileOps, descriptors_left_open

from lastgood.barriers import Barrier
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import StorageError
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo


class Hanging:
    """Operations that wait until :meth:`release`, and are then done; ``waiting`` says that one does."""

    def __init__(self, ops: RecordingFileOps, *names: str) -> None:
        self.waiting = threading.Event()
        self._over = threading.Event()
        for name in names:
            ops.replace_call(name, self._wait)

    def _wait(self, real: Any, *arguments: Any) -> Any:
        self.waiting.set()
        self._over.wait()
        return real(*arguments)

    def release(self) -> None:
        self._over.set()
        for thread in threading.enumerate():
            if thread.name.startswith("lastgood-"):
                thread.join(60)


@pytest.fixture
def ops() -> RecordingFileOps:
    return RecordingFileOps()


@pytest.fixture
def hang(ops: RecordingFileOps) -> Iterator[Any]:
    made: list[Hanging] = []

    def make(*names: str) -> Hanging:
        made.append(Hanging(ops, *names))
        return made[-1]

    yield make
    for hanging in made:
        hanging.release()


def impatient_writer(ops: RecordingFileOps) -> CheckpointWriter:
    config = CheckpointWriterConfig(no_progress_timeout_secs=0.2)
    return CheckpointWriter(config, RankInfo(0, 1), storage=LocalStorage(ops))


@pytest.mark.parametrize(
    ("operation", "phase", "says"),
    [
        ("status", "look up", "Nothing was changed"),
        ("open_exclusive", "lock", "Nothing was published; earlier checkpoints are untouched"),
        ("reserve", "begin", "Nothing was published"),
        ("pwrite", "write", "storage took no data for 0.2 s"),
        ("fsync", "make durable", "Nothing was published"),
    ],
)
def test_a_save_on_storage_that_hangs_is_given_up_and_publishes_nothing(
    tmp_path: Path, ops: RecordingFileOps, hang: Any, operation: str, phase: str, says: str
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    hanging = hang(operation)
    with pytest.raises(StorageError, match=r"0\.2 s") as caught:
        impatient_writer(ops).write(str(tmp_path), state_of(2))
    assert says in str(caught.value)
    assert caught.value.phase == phase
    assert hanging.waiting.is_set()
    # Even if the storage comes back to life: what was given up stays given up, and is cleared away.
    hanging.release()
    assert contents(tmp_path) == before
    ops.heal(operation)
    impatient_writer(ops).write(str(tmp_path), state_of(3))
    assert_state(read(tmp_path), 3)


def test_a_publication_that_hangs_says_that_it_does_not_know(tmp_path: Path, ops: RecordingFileOps, hang: Any) -> None:
    save(tmp_path, 1)
    hanging = hang("replace")
    with pytest.raises(StorageError, match="Whether it was published is not known"):
        impatient_writer(ops).write(str(tmp_path), state_of(2))
    hanging.release()
    assert read(tmp_path)["step"] in (1, 2)
    assert temporaries(tmp_path) == []


def test_clearing_up_on_storage_that_hangs_does_not_hang(
    tmp_path: Path, ops: RecordingFileOps, hang: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hang("fsync", "unlink")
    with pytest.raises(StorageError, match=r"make durable of .*checkpoint_0\.pt"):
        impatient_writer(ops).write(str(tmp_path), state_of(1))
    assert "stays behind until the next save of that name" in caplog.text


def test_every_call_of_a_backend_has_the_limit(tmp_path: Path, ops: RecordingFileOps, hang: Any) -> None:
    file = str(tmp_path / "file")
    LocalStorage().put(file, b"old")
    storage = StorageInTime(LocalStorage(ops), 0.1)
    opened = storage.open(file)
    begun = storage.begin(str(tmp_path / "other"), 3)
    hang("status", "open_read", "open_exclusive", "list_directory", "unlink", "pread_into", "pwrite")
    for call in (
        lambda: storage.put(file, b"new"),
        lambda: storage.put_if_absent(file, b"new"),
        lambda: storage.open(file),
        lambda: storage.exists(file),
        lambda: storage.list(str(tmp_path)),
        lambda: storage.delete(file),
        lambda: opened.read_into(0, memoryview(bytearray(3))),
        lambda: begun.write_at(0, memoryview(b"new")),
    ):
        with pytest.raises(StorageError, match=r"did not answer within 0\.1 s"):
            call()
    opened.close()
    begun.abort()


def test_a_write_that_comes_back_when_it_was_given_up_leaves_nothing(
    tmp_path: Path, ops: RecordingFileOps, hang: Any
) -> None:
    write = StorageInTime(LocalStorage(ops), 0.1).begin(str(tmp_path / "file"), 3)
    hanging = hang("pwrite")
    with pytest.raises(StorageError, match=r"did not answer within 0\.1 s"):
        write.write_at(0, memoryview(b"new"))
    write.abort()
    hanging.release()
    assert list(tmp_path.iterdir()) == []
    assert descriptors_left_open(ops) == set()


def test_in_time_it_is_the_same_storage(tmp_path: Path) -> None:
    storage = StorageInTime(LocalStorage(), 60)
    file = str(tmp_path / "file")
    storage.put(file, b"first")
    storage.put(file, b"second")
    assert storage.exists(file)
    assert storage.list(str(tmp_path)) == ["file"]
    opened = storage.open(file)
    target = bytearray(6)
    opened.read_into(0, memoryview(target))
    opened.close()
    assert (bytes(target), opened.size, opened.path) == (b"second", 6, file)
    storage.delete(file)
    assert not storage.exists(file)
    storage.put_if_absent(file, b"third")
    with suppress(FileExistsError):
        storage.put_if_absent(file, b"fourth")
    assert (tmp_path / "file").read_bytes() == b"third"


def test_after_a_commit_abort_is_not_passed_on(tmp_path: Path) -> None:
    """The contract of a backend: exactly one of the two ends a write."""
    aborted: list[str] = []

    class Strict(LocalStorage):
        def begin(self, path: str, size: int) -> Any:
            write = super().begin(path, size)
            write.abort = lambda: aborted.append(path)  # type: ignore[method-assign]
            return write

    class Fails(Barrier):
        def execute_barrier(self) -> None:
            raise ValueError("not today")

    config = CheckpointWriterConfig()
    for world_size in (1, 2):  # alone, nothing is committed yet; with others, this rank's file has its name already
        writer = CheckpointWriter(config, RankInfo(0, world_size), Fails(), storage=Strict())
        with pytest.raises(ValueError, match="not today"):
            writer.write(str(tmp_path / str(world_size)), state_of(1))
    assert aborted == [str(tmp_path / "1" / "checkpoint_0.pt")]


@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
def test_the_failure_of_a_writing_thread_comes_out_as_it_is(
    tmp_path: Path, ops: RecordingFileOps, operation: str
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    ops.fail(operation, 5)
    with pytest.raises(StorageError, match="I/O error") as caught:
        impatient_writer(ops).write(str(tmp_path), state_of(2, 10_000_000))
    assert caught.value.errno == 5
    assert isinstance(caught.value.__cause__, OSError)
    assert contents(tmp_path) == before
    assert len(ops.of("fsync")) == (operation == "fsync")  # hazard 9: never a second attempt


@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
def test_hazard_18a_a_save_interrupted_by_a_signal_publishes_nothing(
    tmp_path: Path, ops: RecordingFileOps, operation: str
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    over = threading.Event()

    def interrupted(real: Any, *arguments: Any) -> Any:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as Ctrl-C does
        over.wait()
        return real(*arguments)

    ops.replace_call(operation, interrupted)
    patient = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), storage=LocalStorage(ops))
    with pytest.raises(KeyboardInterrupt):
        patient.write(str(tmp_path), state_of(2))
    over.set()
    assert contents(tmp_path) == before


def test_hazard_09_a_failed_fsync_is_never_repeated(tmp_path: Path, ops: RecordingFileOps) -> None:
    save(tmp_path, 1)
    ops.fail("fsync", 5)
    with pytest.raises(StorageError):
        impatient_writer(ops).write(str(tmp_path), state_of(2))
    assert len(ops.of("fsync")) == 1
    assert_state(read(tmp_path), 1)
    assert temporaries(tmp_path) == []
    ops.heal("fsync")
    impatient_writer(ops).write(str(tmp_path), state_of(3))
    # A new file, fsynced once, and its directory after it has its name.
    assert len({call.path for call in ops.of("fsync")}) == 2
    assert "fsync_directory" in ops.names()[ops.names().index("replace") :]
    assert_state(read(tmp_path), 3)


@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
def test_storage_that_hangs_does_not_keep_the_interpreter_from_exiting(tmp_path: Path, operation: str) -> None:
    code = f"""
import sys, threading
from lastgood._image_writer import write_durably
from lastgood.errors import StorageError
from lastgood.format.nodes import DictNode
from lastgood.storage.file_ops import OsFileOps
from lastgood.storage.local import LocalStorage

class Image:
    size = 100_000

def stream(image, pieces):
    pieces.append(bytes(image.size))

import lastgood._image_writer as module
module.stream_image = stream

class Hangs(OsFileOps):
    def {operation}(self, *arguments):
        threading.Event().wait()

try:
    write_durably(Image(), LocalStorage(Hangs()), sys.argv[1], rank=0, no_progress_timeout_secs=0.2)
except StorageError as error:
    print("given up:", error.phase)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == f"given up: {'write' if operation == 'pwrite' else 'make durable'}\n"
    assert run.stderr == ""
