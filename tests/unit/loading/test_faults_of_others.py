"""What is not the file's fault must not be called damage, and no reader waits for ever."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lastgood
from lastgood import CheckpointReader, RankInfo
from lastgood._loading import records
from lastgood.checkpoint_reader import StorageInTime
from lastgood.errors import StorageError
from lastgood.storage.base import StoredFile
from lastgood.storage.local import LocalStorage

STATES: dict[str, Callable[[], Any]] = {
    "plain": lambda: {"w": torch.ones(3)},
    "opaque": lambda: {"w": torch.eye(3).to_sparse()},
}
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "ours": lastgood.save,
    "torch": torch.save,
    "legacy": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
}
CASES = pytest.mark.parametrize(
    ("writer", "state"),
    [("ours", "plain"), ("ours", "opaque"), ("torch", "plain"), ("torch", "opaque"), ("legacy", "plain")],
)


@CASES
def test_what_a_map_location_function_raises_comes_through(tmp_path: Path, writer: str, state: str) -> None:
    file = tmp_path / "state.pt"
    WRITERS[writer](STATES[state](), file)

    def locate(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        raise KeyError("no such place")

    with pytest.raises(KeyError, match="no such place"):
        lastgood.load(file, map_location=locate)


@CASES
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device of this test is there")
def test_a_device_that_is_not_there_is_torchs_error(tmp_path: Path, writer: str, state: str) -> None:
    file = tmp_path / "state.pt"
    WRITERS[writer](STATES[state](), file)
    with pytest.raises(RuntimeError, match="CUDA") as caught:
        lastgood.load(file, map_location="cuda")
    assert not isinstance(caught.value, lastgood.CorruptCheckpointError)


class _Blocking(LocalStorage):
    """Local storage, one of whose answers comes only when the test is over."""

    def __init__(self, blocked: str, over: threading.Event) -> None:
        super().__init__()
        self._blocked = blocked
        self._over = over

    def exists(self, path: str) -> bool:
        self._wait_at("exists")
        return super().exists(path)

    def open(self, path: str) -> Any:
        self._wait_at("open")
        file = super().open(path)
        return _BlockingFile(file, self._over) if self._blocked == "read" else file

    def _wait_at(self, operation: str) -> None:
        if self._blocked == operation:
            self._over.wait()


class _BlockingFile:
    def __init__(self, file: StoredFile, over: threading.Event) -> None:
        self._file = file
        self._over = over
        self.path, self.size = file.path, file.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._over.wait()

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("blocked", ["exists", "open", "read"])
def test_a_storage_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    lastgood.save({"w": torch.ones(3)}, tmp_path / "checkpoint_0.pt")
    monkeypatch.setattr(records, "NO_PROGRESS_TIMEOUT_SECS", 0.2)
    over = threading.Event()
    reader = CheckpointReader(RankInfo(0, 1))
    reader._storage = StorageInTime(_Blocking(blocked, over), 0.2)
    try:
        with pytest.raises(StorageError):
            reader.read(str(tmp_path))
    finally:
        over.set()
