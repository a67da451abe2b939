"""The synchronous checkpointer as a training script sees it."""

import errno
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.saves import assert_state, contents, read, save, state_of, temporaries, writer_of
from tests.storage.recording import RecordingFileOps, refuse_direct_at_open, refuse_direct_when_used

from lastgood.builder import make_sync_checkpointer
from lastgood.checkpoint_reader import CheckpointReader
from lastgood.checkpoint_writer import CheckpointWriter
from lastgood.checkpointer import Checkpointer, SyncCheckpointer
from lastgood.errors import CheckpointNotFoundError, CorruptCheckpointError, MissingKeysError, StorageError
from lastgood.types import RankInfo


@pytest.fixture
def checkpointer() -> SyncCheckpointer:
    return make_sync_checkpointer()


def test_save_returns_none_and_the_file_is_torchs(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    assert checkpointer.save(str(tmp_path / "step-1"), state_of(1)) is None
    assert list(contents(tmp_path)) == ["step-1/checkpoint_0.pt"]
    assert_state(torch.load(tmp_path / "step-1" / "checkpoint_0.pt", weights_only=True), 1)
    assert_state(checkpointer.load(str(tmp_path / "step-1")), 1)


def test_it_is_a_checkpointer(checkpointer: SyncCheckpointer) -> None:
    assert isinstance(checkpointer, Checkpointer)
    with pytest.raises(TypeError):
        Checkpointer()  # type: ignore[abstract]


class TheOtherOrder(CheckpointWriter):
    """A subclass as users have them: no ``super().__init__``, the arguments in the other order, nothing written."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.closed = False

    def write(self, state_dict: Any, path: str, **kwargs: Any) -> None:  # type: ignore[override]
        self.written.append((state_dict, path, kwargs))

    def close(self) -> None:
        self.closed = True


class TheSameOrder(TheOtherOrder):
    def write(self, path: str, state_dict: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.written.append((state_dict, path, kwargs))


class OnlyWrites(CheckpointWriter):
    def __init__(self) -> None:
        pass

    def write(self, path: str, state_dict: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [TheOtherOrder, TheSameOrder])
def test_writers_of_the_users_own_get_everything_by_keyword(kind: type[TheOtherOrder]) -> None:
    writer = kind()
    checkpointer = SyncCheckpointer(writer, CheckpointReader(RankInfo(0, 1)))
    state = state_of(1)
    checkpointer.save("", state, epoch=3)
    [(written, path, kwargs)] = writer.written
    assert written is state
    assert (path, kwargs) == ("", {"epoch": 3})
    checkpointer.close()
    assert writer.closed


def test_close_needs_nothing_from_a_writer_that_was_never_set_up() -> None:
    SyncCheckpointer(OnlyWrites(), CheckpointReader(RankInfo(0, 1))).close()


def test_after_close_nothing_is_left_and_closing_again_does_no_harm(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    checkpointer = SyncCheckpointer(writer_of(ops=ops), CheckpointReader(RankInfo(0, 1)))
    checkpointer.save(str(tmp_path), state_of(1))
    checkpointer.close()
    checkpointer.close()
    opened = sum(name.startswith("open_") for name in ops.names())
    assert ops.names().count("close") == opened > 0


def test_arguments_of_load_reach_the_reader() -> None:
    given: dict[str, Any] = {}

    class Noting(CheckpointReader):
        def __init__(self) -> None:
            pass

        def read(self, path: str, state_dict: Any = None, *, map_location: Any = None, **kwargs: Any) -> Any:
            given.update(kwargs, path=path, state_dict=state_dict, map_location=map_location)
            return {}, ["a"]

    target: dict[str, Any] = {}
    checkpointer = SyncCheckpointer(OnlyWrites(), Noting())
    checkpointer.load("somewhere", target, default_map_location="meta", shard=3)
    assert given == {"path": "somewhere", "state_dict": target, "map_location": "meta", "shard": 3}
    assert given["state_dict"] is target


def test_partial_and_strict(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    checkpointer.save(str(tmp_path), state_of(1))
    target: dict[str, Any] = {"model": {"bias": torch.zeros(10), "scale": None}}
    bias = target["model"]["bias"]
    assert checkpointer.load(str(tmp_path), target) is target
    assert torch.equal(bias, state_of(1)["model"]["bias"])
    with pytest.raises(RuntimeError, match=r"missing keys: \['model\.scale'\]") as caught:
        checkpointer.load(str(tmp_path), {"model": {"bias": None, "scale": None}}, strict=True)
    assert isinstance(caught.value, MissingKeysError)
    assert caught.value.missing_keys == ("model.scale",)
    assert caught.value.path == str(tmp_path)


def test_no_such_checkpoint(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        checkpointer.load(str(tmp_path / "nowhere"))


def test_a_path_that_is_a_file(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StorageError, match="is a file, not a directory") as caught:
        checkpointer.save(str(tmp_path / "file"), state_of(1))
    assert caught.value.errno == errno.ENOTDIR
    assert contents(tmp_path) == {"file": b"kept"}


def test_training_may_change_the_state_as_soon_as_save_has_returned(
    checkpointer: SyncCheckpointer, tmp_path: Path
) -> None:
    state = state_of(1)
    checkpointer.save(str(tmp_path), state)
    state["model"]["weights"].zero_()
    state["step"] = 99
    assert_state(checkpointer.load(str(tmp_path)), 1)


# Hazards at this level; processes that are killed stand in tests/crash


def test_hazard_05_nothing_is_ever_written_under_the_final_name(tmp_path: Path) -> None:
    """The one operation on the final name gives it to a file that is whole and durable."""
    save(tmp_path, 1)
    ops = RecordingFileOps()
    writer_of(ops=ops).write(str(tmp_path), state_of(2))
    final = str(tmp_path / "checkpoint_0.pt")
    touching = [call.name for call in ops.calls if final in (call.path, *call.arguments)]
    assert set(touching) <= {"open_read", "pread_into", "status", "close", "replace"}
    assert touching.count("replace") == 1
    [written] = {call.path for call in ops.of("pwrite")}
    assert written.endswith(".tmp")
    assert [call.path for call in ops.of("fsync")] == [written]
    assert ops.names().index("fsync") > max(place for place, name in enumerate(ops.names()) if name == "pwrite")
    assert ops.names().index("fsync") < ops.names().index("replace")


def test_hazard_06_nothing_of_the_old_checkpoint_vouches_for_the_new_one(tmp_path: Path) -> None:
    """The file is its own commit record: at every operation of the second save, one or the other can be loaded."""
    save(tmp_path, 1)
    ops = RecordingFileOps()
    found: list[int] = []

    def look(name: str) -> None:
        def looking(real: Any, *arguments: Any) -> Any:
            before = read(tmp_path)
            assert_state(before, before["step"])
            result = real(*arguments)
            after = read(tmp_path)
            assert_state(after, after["step"])
            found.extend((before["step"], after["step"]))
            return result

        ops.replace_call(name, looking)

    for name in ("open_exclusive", "reserve", "pwrite", "fsync", "replace", "fsync_directory"):
        look(name)
    writer_of(ops=ops).write(str(tmp_path), state_of(2))
    assert found == sorted(found)
    assert set(found) == {1, 2}


@pytest.mark.parametrize("refuse", [refuse_direct_at_open, refuse_direct_when_used])
def test_hazard_17_a_file_system_without_direct_io_is_no_obstacle(tmp_path: Path, refuse: Any) -> None:
    ops = RecordingFileOps()
    refuse(ops)
    elements = 5_000_000
    writer_of(ops=ops).write(str(tmp_path), state_of(1, elements))
    assert ops.of("open_direct")
    assert_state(read(tmp_path), 1, elements)
    assert temporaries(tmp_path) == []


def test_a_damaged_checkpoint_can_be_replaced(checkpointer: SyncCheckpointer, tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0.pt").write_bytes(b"half a file")
    with pytest.raises(CorruptCheckpointError):
        checkpointer.load(str(tmp_path))
    checkpointer.save(str(tmp_path), state_of(1))
    assert_state(checkpointer.load(str(tmp_path)), 1)


def test_save_waits_for_the_future_of_a_writer_of_the_users_own() -> None:
    failed: Future[None] = Future()
    failed.set_exception(OSError("the disk is gone"))

    class Background(CheckpointWriter):
        def __init__(self) -> None:
            pass

        def write(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> Future[None]:
            return failed

    checkpointer = SyncCheckpointer(Background(), CheckpointReader(RankInfo(0, 1)))
    with pytest.raises(OSError, match="the disk is gone"):
        checkpointer.save("anywhere", {})
