"""What ranks that vote promise each other, as threads over a real store; tests/distributed has the processes."""

import contextlib
import json
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.saves import assert_state, contents, read, state_of, temporaries
from tests.helpers.workers import PATIENCE_SECS
from tests.storage.recording import RecordingFileOps
from tests.unit.coordination.ranks_here import Ranks, coordinations, impatient, join_telling_threads

from lastgood._coordination import together
from lastgood._coordination.calls import SaveCalls
from lastgood._coordination.counting import count_votes
from lastgood._coordination.exchange import Exchange
from lastgood._coordination.together import SaveTogether
from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from lastgood.errors import (
    BarrierTimeoutError,
    CheckpointExistsError,
    ConfigError,
    CorruptCheckpointError,
    StorageError,
    SupersededError,
    UncommittedCheckpointError,
)
from lastgood.format.epoch import take_epoch
from lastgood.format.manifest import checkpoint_file
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

FILES = ["checkpoint_0.pt", "checkpoint_1.pt", "checkpoint_2.pt", "manifest.json"]


@pytest.fixture
def make_ranks() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(world_size: int = 3, **options: Any) -> Ranks:
        made.append(Ranks(world_size, **options))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def manifest_of(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())["manifest"]


def watcher(ranks: Ranks) -> Any:
    return dist.TCPStore("127.0.0.1", ranks.coordinations[0].port, is_master=False, wait_for_workers=False)


def first_id(ranks: Ranks, path: Path) -> str:
    """The id of the first save to a path, as anybody can find it who knows the series."""
    return SaveCalls(ranks.coordinations[0]).new(str(path)).save_id


def assert_not_committed(path: Path, world_size: int = 3) -> None:
    assert not (path / "manifest.json").exists()
    for rank in range(world_size):
        with pytest.raises((UncommittedCheckpointError, CorruptCheckpointError, FileNotFoundError)):
            read(path, rank, world_size)


def test_what_another_job_commits_while_rank_0_waits_for_its_lock_is_met_before_anything_is_written(
    make_ranks: Any, tmp_path: Path
) -> None:
    other, path = tmp_path / "other", tmp_path / "step-1"
    assert make_ranks().save(other, 1) == [None] * 3
    ops, waits = RecordingFileOps(), threading.Event()

    def lock(real: Callable[[int], bool], descriptor: int) -> bool:
        waits.set()
        return real(descriptor)

    ops.replace_call("lock", lock)
    ranks = make_ranks(storages={0: LocalStorage(ops)})
    held = LocalStorage().try_lock(checkpoint_file(str(path), 0))
    assert held is not None
    saves = ranks.start(path, 10)
    assert waits.wait(PATIENCE_SECS)
    shutil.copy(other / "manifest.json", path)
    held.release()
    assert isinstance(finished(saves)[0], CheckpointExistsError)
    assert ops.of("pwrite") == []


def test_all_ranks_files_and_the_manifest_have_the_one_save_id(make_ranks: Any, tmp_path: Path) -> None:
    ranks = make_ranks()
    ids = []
    for step in (1, 2):
        path = tmp_path / f"step-{step}"
        assert ranks.save(path, step) == [None] * 3
        assert sorted(contents(path)) == FILES
        manifest = manifest_of(path)
        assert [file["save_id"] for file in manifest["files"]] == [manifest["save_id"]] * 3
        ids.append(manifest["save_id"])
        for rank in range(3):
            assert_state(read(path, rank, 3), step + rank)
    assert len(set(ids)) == 2
    # Onto a committed one all refuse, and nothing changes.
    before = contents(tmp_path / "step-1")
    for error in ranks.save(tmp_path / "step-1", 9):
        assert isinstance(error, CheckpointExistsError)
    assert contents(tmp_path / "step-1") == before
    assert ranks.save(tmp_path / "step-3", 3) == [None] * 3


def test_what_saves_leave_in_the_store_does_not_grow(make_ranks: Any, tmp_path: Path) -> None:
    ranks = make_ranks(2)
    store = watcher(ranks)
    sizes = []
    for step in range(6):
        assert ranks.save(tmp_path / f"step-{step}", step) == [None] * 2
        sizes.append(store.num_keys())
    assert sizes[1:] == [sizes[1]] * 5


def test_tables_are_sent_by_one_rank_and_those_of_checksums_go_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int]] = []
    set_value = dist.TCPStore.set

    def note_tables(store: Any, key: str, value: Any) -> None:
        if key.startswith("tables/"):
            sent.append((key, len(value)))
        set_value(store, key, value)

    monkeypatch.setattr(dist.TCPStore, "set", note_tables)
    ranks = Ranks(3, replicated=["model.*"])
    try:
        store, sizes = watcher(ranks), []
        for step in range(4):
            sent.clear()
            saves = [
                start(writer.write, str(tmp_path / f"step-{step}"), {"model": {"weights": torch.full((9,), step)}})
                for writer in ranks.writers
            ]
            assert finished(saves) == [None] * 3
            # Of layouts, which stay as they are, and of checksums, which do not: each once for all ranks.
            assert len(sent) == len({key for key, _ in sent}) == (2 if step == 0 else 1)
            sizes.append(store.num_keys())
        assert sizes[1:] == [sizes[1]] * 3
    finally:
        ranks.close()


def test_layouts_that_change_at_every_save_leave_nothing_in_the_store(tmp_path: Path) -> None:
    ranks = Ranks(2, replicated=["model.*"])
    try:
        store, sizes = watcher(ranks), []
        for step in range(4):
            saves = [
                start(writer.write, str(tmp_path / f"step-{step}"), {"model": {"weights": torch.zeros(9 + step)}})
                for writer in ranks.writers
            ]
            assert finished(saves) == [None] * 2
            sizes.append(store.num_keys())
        assert sizes[1:] == [sizes[1]] * 3
    finally:
        ranks.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_hazard_26_a_rank_that_fails_ends_the_save_of_all_with_its_reason(
    make_ranks: Any, tmp_path: Path, failing: int
) -> None:
    """The others would wait ten minutes."""

    def refuse(path: str) -> None:
        if path.endswith("step-1"):
            raise ValueError("this rank's hook says no")

    ranks = make_ranks(hooks={failing: refuse})
    path = tmp_path / "step-1"
    errors = ranks.save(path, 1)
    assert isinstance(errors[failing], ValueError)
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(errors[rank], BarrierTimeoutError)
        assert errors[rank].missing_ranks == (failing,)
        assert f"rank {failing} gave up: ValueError: this rank's hook says no" in str(errors[rank])
    assert_not_committed(path)
    assert temporaries(path) == []
    for name in ("step-2", "step-1"):
        (tmp_path / name).mkdir(exist_ok=True)
    assert ranks.save(tmp_path / "step-2", 2) == [None] * 3


def test_hazard_26_a_rank_that_gave_up_before_anybody_came_is_heard_of_by_all(make_ranks: Any, tmp_path: Path) -> None:
    ranks = make_ranks()
    [error] = finished([start(ranks.writers[1].write, str(tmp_path / "step-1"), {"lock": threading.Lock()})])
    assert "lock" in str(error)
    for other in ranks.save(tmp_path / "step-1", 1, [0, 2]):
        assert isinstance(other, BarrierTimeoutError)
        assert "rank 1 gave up: UnsupportedStateError" in str(other)
    # The next save to the same path is another one.
    assert ranks.save(tmp_path / "step-1", 5) == [None] * 3


@pytest.mark.parametrize("missing", [0, 2])
def test_hazard_27_a_rank_that_does_not_come_is_named_in_time(
    make_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    # When that ends, it asks the name service who the other end is, however long this may take.
    monkeypatch.setattr(dist.TCPStore, "wait", MagicMock(side_effect=AssertionError("torch waits")))
    ranks = make_ranks(timeout_secs=4)
    path = tmp_path / "step-1"
    for error in ranks.save(path, 1, [rank for rank in range(3) if rank != missing]):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (missing,)
        assert f"waited 4 s for rank {missing}" in str(error)
        assert f"Look at the log of rank {missing}" in str(error)
    assert_not_committed(path)
    if missing == 0:  # Whoever resumes waits for rank 0's lock: until rank 0 has it, no file of the save gets its name.
        assert list(path.glob("checkpoint_*")) == []
    # Who comes too late hears the same, at once, and nothing is committed by it.
    [late] = ranks.save(path, 1, [missing])
    assert isinstance(late, BarrierTimeoutError)
    assert late.missing_ranks == (missing,)
    assert_not_committed(path)
    assert ranks.save(tmp_path / "step-2", 2) == [None] * 3


def test_hazard_29_two_processes_of_the_same_rank_do_not_count_as_two(make_ranks: Any, tmp_path: Path) -> None:
    ranks = make_ranks()
    twin = CheckpointWriter(CheckpointWriterConfig(), RankInfo(1, 3), coordination=ranks.coordinations[1])
    path = tmp_path / "step-1"
    saves = ranks.start(path, 1, [0, 1])
    watcher(ranks).wait([f"save/{first_id(ranks, path)}/came/1"])
    [told] = finished([start(twin.write, str(path), state_of(7))])
    assert isinstance(told, ConfigError)
    assert "another process runs as the same rank" in str(told)
    # Whose file stands there now, nobody can say: nothing is committed.
    for error in finished(saves):
        assert isinstance(error, BarrierTimeoutError)
        assert "rank 1 gave up: ConfigError" in str(error)
    assert_not_committed(path)


def test_a_manifest_that_cannot_be_published_fails_all_with_the_reason(make_ranks: Any, tmp_path: Path) -> None:
    class Full(LocalStorage):
        def begin(self, path: str, size: int) -> Any:
            if path.endswith("manifest.json"):
                raise StorageError("No space left on device", path=path)
            return super().begin(path, size)

    ranks = make_ranks(storages={0: Full()})
    errors = ranks.save(tmp_path / "step-1", 1)
    assert isinstance(errors[0], StorageError)
    for error in errors[1:]:
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (0,)
        assert "rank 0 gave up: StorageError: No space left on device" in str(error)
    assert_not_committed(tmp_path / "step-1")


def test_what_rank_0_says_counts_although_the_manifest_is_there(make_ranks: Any, tmp_path: Path) -> None:
    """It may not survive a power cut: then no rank says that the checkpoint is durable."""

    class Forgetful(LocalStorage):
        def begin(self, path: str, size: int) -> Any:
            upload = super().begin(path, size)
            if path.endswith("manifest.json"):
                publish = upload.commit

                def publish_and_fail(*, replace: bool = True) -> None:
                    publish(replace=replace)
                    raise StorageError("Input/output error", path=path)

                upload.commit = publish_and_fail  # type: ignore[method-assign]
            return upload

    errors = make_ranks(storages={0: Forgetful()}).save(tmp_path / "step-1", 1)
    assert (tmp_path / "step-1" / "manifest.json").exists()
    assert isinstance(errors[0], StorageError)
    for error in errors[1:]:
        assert isinstance(error, BarrierTimeoutError)
        assert "rank 0 gave up: StorageError: Input/output error" in str(error)


def test_a_file_that_is_not_the_one_just_written_is_not_voted_for(make_ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    durable = threading.Event()

    class Swapping(LocalStorage):
        def open(self, name: str) -> Any:
            if durable.is_set() and name.endswith("checkpoint_1.pt"):
                Path(name).write_bytes(b"somebody else's")
            return super().open(name)

    ranks = make_ranks(storages={1: Swapping()}, hooks={1: lambda _: durable.set()})
    errors = ranks.save(path, 1)
    assert isinstance(errors[1], CorruptCheckpointError)
    assert "not the file that rank 1 has just written" in str(errors[1])
    assert_not_committed(path)


@pytest.mark.parametrize("manifest", ["its own", "another job's", "none"])
def test_when_rank_0_is_lost_after_the_last_vote_the_manifest_says_how_it_ended(
    make_ranks: Any, tmp_path: Path, manifest: str
) -> None:
    """Its process dies with the store, just before or just after it has published."""
    ops, other, path = RecordingFileOps(), tmp_path / "other", tmp_path / "step-1"
    assert make_ranks().save(other, 1) == [None] * 3
    ranks = make_ranks(storages={1: LocalStorage(ops)})

    def die(save: SaveTogether) -> None:
        if manifest == "its own":
            save._is_told = True
            publish(save)
        elif manifest == "another job's":
            shutil.copy(other / "manifest.json", path)
        ops.calls.clear()
        ranks.end_store()
        raise SystemError("rank 0 died")

    publish = SaveTogether._publish_manifest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SaveTogether, "_tell_result", lambda *_: None)
        patch.setattr(SaveTogether, "_publish_manifest", die)
        patch.setattr(SaveTogether, "give_up", lambda *_: None)
        errors = ranks.save(path, 1)
    assert isinstance(errors[0], SystemError)
    if manifest == "its own":
        assert errors[1:] == [None, None]
        for rank in range(3):
            assert_state(read(path, rank, 3), 1 + rank)
        # Rank 0 may have died before it had made the name certain.
        assert [call.path for call in ops.of("fsync_directory")] == [str(path)]
    else:
        for error in errors[1:]:
            assert isinstance(error, BarrierTimeoutError)
            assert error.missing_ranks == (0,)
            assert "broke" in str(error)
        if manifest == "none":
            assert_not_committed(path)


def test_a_store_served_anew_at_the_same_address_is_found_by_those_who_knew_the_old_one(
    make_ranks: Any, tmp_path: Path
) -> None:
    ranks = make_ranks()
    assert ranks.save(tmp_path / "step-1", 1) == [None] * 3
    ranks.end_store()
    ranks.serve_anew()
    assert ranks.save(tmp_path / "step-2", 2) == [None] * 3


@pytest.mark.parametrize("told", ["at once", "with its next save"])
def test_hazard_26_a_rank_that_was_cut_off_from_a_store_that_is_gone_says_so_in_the_next_one(
    make_ranks: Any, tmp_path: Path, told: str
) -> None:
    """Rank 0's process died before it knew of the save, and the next process makes its part after all."""
    waits = threading.Event()
    came = Exchange.came

    def look(exchange: Exchange, key: str, timeout_secs: float | None = None) -> bool:
        waits.set()
        return came(exchange, key, timeout_secs)

    ranks, path = make_ranks(), tmp_path / "step-2"
    if told == "with its next save":
        ranks.writers[1]._coordinator._failures._timeout_secs = 0.2
    assert ranks.save(tmp_path / "step-1", 1) == [None] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "came", look)
        saves = ranks.start(path, 2, [1])
        assert waits.wait(PATIENCE_SECS)
    with impatient() if told == "with its next save" else contextlib.nullcontext():
        ranks.end_store()
        [error] = finished(saves)
        assert isinstance(error, BarrierTimeoutError)
        assert "broke" in str(error)
        if told == "with its next save":
            join_telling_threads()
    ranks.serve_anew()
    saves = ranks.start(path, 2, [0, 2])
    if told == "with its next save":
        later = ranks.start(tmp_path / "step-3", 3, [1])
    for error in finished(saves):
        assert isinstance(error, BarrierTimeoutError)
        assert error.missing_ranks == (1,)
        assert "rank 1 gave up: BarrierTimeoutError" in str(error)
    assert_not_committed(path)
    if told == "with its next save":
        assert finished([*later, *ranks.start(tmp_path / "step-3", 3, [0, 2])]) == [None] * 3
    assert ranks.save(tmp_path / "step-4", 4) == [None] * 3


def test_rank_0_holds_the_lock_of_its_file_for_the_whole_save(make_ranks: Any, tmp_path: Path) -> None:
    """Whoever resumes waits for that lock, and so for all ranks."""
    path = tmp_path / "step-1"

    def look(_: str) -> None:
        reached.set()
        assert go_on.wait(60)

    reached, go_on = threading.Event(), threading.Event()
    ranks = make_ranks(hooks={2: look})
    saves = ranks.start(path, 1)
    assert reached.wait(60)
    # The others have published their files, and wait for rank 2.
    watcher(ranks).wait([f"save/{first_id(ranks, path)}/came/{rank}" for rank in range(2)])
    found = [LocalStorage().try_lock(checkpoint_file(str(path), rank)) for rank in range(2)]
    assert found[0] is None
    assert found[1] is not None
    found[1].release()
    go_on.set()
    assert finished(saves) == [None] * 3
    lock = LocalStorage().try_lock(checkpoint_file(str(path), 0))
    assert lock is not None
    lock.release()


# Another job takes over


def test_hazard_29_a_job_that_was_replaced_publishes_neither_a_file_nor_a_manifest(
    make_ranks: Any, tmp_path: Path
) -> None:
    """Its successor begins when rank 1's bytes are durable, and have no name yet."""
    path = tmp_path / "step-2"

    def replace(name: str) -> None:
        if name == str(path):
            assert young.save(tmp_path / "step-9", 9) == [None] * 3

    young, ops = make_ranks(), RecordingFileOps()
    old = make_ranks(hooks={1: replace}, storages={0: LocalStorage(ops)})
    assert old.save(tmp_path / "step-1", 1) == [None] * 3
    errors = old.save(path, 2)
    assert isinstance(errors[1], SupersededError)
    assert f"another job has taken over {tmp_path}" in str(errors[1])
    for error in (errors[0], errors[2]):
        assert isinstance(error, (BarrierTimeoutError, SupersededError))
        assert "another job has taken over" in str(error)
    assert not (path / "checkpoint_1.pt").exists()
    assert_not_committed(path)
    # For good, and rank 0 writes nothing any more.
    written = len(ops.of("pwrite"))
    assert written > 0
    for error in old.save(tmp_path / "step-3", 3):
        assert "another job has taken over" in str(error)
    assert list((tmp_path / "step-3").glob("checkpoint_*")) == []
    assert len(ops.of("pwrite")) == written
    assert young.save(path, 5) == [None] * 3
    for rank in range(3):
        assert_state(read(path, rank, 3), 5 + rank)


def test_hazard_29_a_job_that_was_replaced_after_its_last_vote_does_not_commit(
    make_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = make_ranks()

    def replace_and_count(*arguments: Any) -> Any:
        take_epoch(LocalStorage(), str(tmp_path), "the job that came after", 60)
        return count_votes(*arguments)

    monkeypatch.setattr(together, "count_votes", replace_and_count)
    errors = ranks.save(tmp_path / "step-1", 1)
    assert isinstance(errors[0], SupersededError)
    assert all("another job has taken over" in str(error) for error in errors)
    assert_not_committed(tmp_path / "step-1")


def test_hazard_06_a_manifest_that_another_has_published_meanwhile_is_not_replaced(
    make_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, path = make_ranks(), tmp_path / "step-1"

    def count_slowly(*arguments: Any) -> Any:
        manifest = count_votes(*arguments)
        (path / "manifest.json").write_bytes(b"another's")
        return manifest

    monkeypatch.setattr(together, "count_votes", count_slowly)
    errors = ranks.save(path, 1)
    assert isinstance(errors[0], CheckpointExistsError)
    assert all("manifest.json" in str(error) for error in errors)
    assert (path / "manifest.json").read_bytes() == b"another's"


def test_hazard_29_a_manifest_whose_bytes_are_slow_to_be_durable_does_not_appear_after_a_takeover(
    make_ranks: Any, tmp_path: Path
) -> None:
    """What may be given up while it goes on holds no lock, and gives the manifest no name."""

    class Slow(LocalStorage):
        def begin(self, path: str, size: int) -> Any:
            upload = super().begin(path, size)
            if path.endswith("manifest.json"):
                make_durable = upload.make_durable

                def let_another_take_over() -> None:
                    make_durable()
                    take_epoch(LocalStorage(), str(tmp_path), "the job that came after", 60)

                upload.make_durable = let_another_take_over  # type: ignore[method-assign]
            return upload

    errors = make_ranks(storages={0: Slow()}).save(tmp_path / "step-1", 1)
    assert isinstance(errors[0], SupersededError)
    assert all("another job has taken over" in str(error) for error in errors)
    assert_not_committed(tmp_path / "step-1")
    assert temporaries(tmp_path / "step-1") == []


def test_all_checkpointers_of_one_job_save_side_by_side(make_ranks: Any, tmp_path: Path) -> None:
    job = secrets.token_hex(16)
    periodic, best = make_ranks(2, job=job), make_ranks(2, job=job)
    for step in range(3):
        assert periodic.save(tmp_path / f"step-{step}", step) == [None] * 2
        assert best.save(tmp_path / f"best-{step}", step) == [None] * 2
    assert json.loads((tmp_path / "lastgood-epoch.json").read_text())["epoch"]["epoch"] == 1


def test_nothing_but_the_record_of_jobs_is_left_beside_the_checkpoints(make_ranks: Any, tmp_path: Path) -> None:
    ops = RecordingFileOps()
    ranks = make_ranks(2, storages={0: LocalStorage(ops), 1: LocalStorage(ops)})
    assert ranks.save(tmp_path / "step-1", 1) == [None] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lastgood-epoch.json", "step-1"]
    # The record, two files and the manifest: each is made durable before it is published.
    assert len(ops.of("lock_shared")) >= 3


def test_a_coordination_is_of_one_rank_and_stands_in_the_place_of_a_barrier(tmp_path: Path) -> None:
    first, second = coordinations(2)
    with pytest.raises(ConfigError, match="of rank 1"):
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 2), coordination=second)
    with pytest.raises(ConfigError, match="not both"):
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 2), object(), coordination=first)  # type: ignore[arg-type]
    first.close()
