"""One rank's write: the order of things, what is refused, and what a failure leaves behind."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.barrier_ranks import finished, start
from tests.helpers.saves import (
    NotingBarrier,
    NotingHook,
    assert_state,
    commit_together,
    contents,
    read,
    save,
    state_of,
    steps,
    temporaries,
    writer_of,
)
from tests.storage.recording import RecordingFileOps

from lastgood.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from lastgood.errors import (
    BarrierTimeoutError,
    CheckpointExistsError,
    ConfigError,
    CorruptCheckpointError,
    StorageError,
    UncommittedCheckpointError,
    UnsupportedStateError,
)
from lastgood.format.archive import open_archive
from lastgood.format.manifest import MAX_MANIFEST_SIZE, decode_manifest
from lastgood.storage.local import LocalStorage
from lastgood.types import RankInfo

# The order of things


def test_one_rank_durable_then_pre_commit_then_barrier_then_published_then_post_commit(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    writer = writer_of(barrier=NotingBarrier(ops), hook=NotingHook(ops), ops=ops)
    writer.write(str(tmp_path), state_of(1))
    # The first: the directory's own name, before anything is promised to be in it.
    assert steps(ops) == [
        "fsync_directory",
        "fsync",
        "pre_commit",
        "barrier",
        "replace",
        "fsync_directory",
        "post_commit",
    ]
    assert ops.of("replace")[0].arguments[1] == str(tmp_path / "checkpoint_0.pt")
    assert_state(read(tmp_path), 1)


def test_several_ranks_without_a_barrier_publish_each_for_itself(tmp_path: Path) -> None:
    for rank in (1, 0):
        ops = RecordingFileOps()
        writer_of(rank, 2, hook=NotingHook(ops), ops=ops).write(str(tmp_path), state_of(rank))
        assert steps(ops) == ["fsync_directory", "fsync", "pre_commit", "replace", "fsync_directory", "post_commit"]
    assert sorted(contents(tmp_path)) == ["checkpoint_0.pt", "checkpoint_1.pt"]
    for rank in (0, 1):
        assert_state(read(tmp_path, rank, 2), rank)
        archive = open_archive(LocalStorage().open(str(tmp_path / f"checkpoint_{rank}.pt")))
        assert archive is not None
        assert archive.index.independent


def test_several_ranks_with_a_barrier_rank_0_publishes_the_manifest_after_it(tmp_path: Path) -> None:
    meeting = threading.Barrier(2)
    doors = [RecordingFileOps(), RecordingFileOps()]

    class SeesTheManifest(NotingHook):
        def post_commit(self, path: str, **kwargs: Any) -> None:
            assert (tmp_path / "manifest.json").exists()
            super().post_commit(path, **kwargs)

        def pre_commit(self, path: str, **kwargs: Any) -> None:
            assert not (tmp_path / "manifest.json").exists()
            super().pre_commit(path, **kwargs)

    writers = [
        writer_of(rank, 2, NotingBarrier(ops, meeting), SeesTheManifest(ops), ops=ops) for rank, ops in enumerate(doors)
    ]
    writes = [start(writer.write, str(tmp_path), state_of(rank)) for rank, writer in enumerate(writers)]
    assert finished(writes) == [None, None]
    own_file = ["fsync_directory", "fsync", "pre_commit", "replace", "fsync_directory", "barrier"]
    # The other rank may see the manifest before its name is certain: it makes sure.
    assert steps(doors[1]) == [*own_file, "fsync_directory", "post_commit"]
    # The manifest never replaces another: it is linked.
    assert steps(doors[0]) == [*own_file, "fsync_directory", "fsync", "link", "fsync_directory", "post_commit"]
    assert doors[0].of("link")[0].arguments[1] == str(tmp_path / "manifest.json")
    assert sorted(contents(tmp_path)) == ["checkpoint_0.pt", "checkpoint_1.pt", "manifest.json"]
    for rank in (0, 1):
        assert_state(read(tmp_path, rank, 2), rank)


def test_the_manifest_names_every_file_with_size_crc_and_save_id(tmp_path: Path) -> None:
    assert commit_together(tmp_path, 1, world_size=3) == [None] * 3
    manifest = decode_manifest((tmp_path / "manifest.json").read_bytes())
    assert manifest.world_size == 3
    for rank, entry in enumerate(manifest.files):
        assert (entry.rank, entry.name) == (rank, f"checkpoint_{rank}.pt")
        assert entry.size == (tmp_path / entry.name).stat().st_size
        archive = open_archive(LocalStorage().open(str(tmp_path / entry.name)))
        assert archive is not None
        assert entry.save_id == archive.index.save_id
        assert not archive.index.independent
    assert manifest.save_id == manifest.files[0].save_id


def test_the_hook_gets_the_very_path_and_the_extra_arguments(tmp_path: Path) -> None:
    class Text(str):
        pass

    ops = RecordingFileOps()
    path = Text(tmp_path)
    marker = object()
    assert writer_of(hook=NotingHook(ops)).write(path, state_of(1), step=7, marker=marker) is None
    before, after = ops.calls
    assert before.path is path
    assert after.path is path
    assert before.arguments == after.arguments == ({"step": 7, "marker": marker},)


@pytest.mark.parametrize("step", [0, 7, -1, 2**70])
def test_the_step_is_noted_in_the_file(tmp_path: Path, step: int) -> None:
    writer_of().write(str(tmp_path), state_of(1), step=step)
    archive = open_archive(LocalStorage().open(str(tmp_path / "checkpoint_0.pt")))
    assert archive is not None
    assert archive.index.step == step


@pytest.mark.parametrize("step", [True, "7", 7.0, None, torch.tensor(7)])
def test_a_step_that_is_no_number_does_no_harm(tmp_path: Path, step: Any) -> None:
    writer_of().write(str(tmp_path), state_of(1), step=step)
    assert_state(read(tmp_path), 1)


def test_paths_of_pathlib_are_welcome(tmp_path: Path) -> None:
    writer_of().write(tmp_path / "new", state_of(1))  # type: ignore[arg-type]
    assert_state(read(tmp_path / "new"), 1)


@pytest.mark.parametrize("path", ["", None, b"somewhere", 7])
def test_what_is_no_path_is_refused(tmp_path: Path, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no path to save a checkpoint at"):
        writer_of().write(path, state_of(1))
    assert contents(tmp_path) == {}


# Failures: nothing published, no debris, the earlier checkpoint intact


class FailingHook(WriterHook):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        if self.stage == "pre_commit":
            raise ValueError("not today")

    def post_commit(self, path: str, **kwargs: Any) -> None:
        if self.stage == "post_commit":
            raise ValueError("not today")


class FailingBarrier(NotingBarrier):
    def execute_barrier(self) -> None:
        super().execute_barrier()
        raise ValueError("not today")


@pytest.mark.parametrize("earlier", [True, False], ids=["onto-an-earlier-one", "fresh"])
@pytest.mark.parametrize(
    "broken",
    [
        {"hook": FailingHook("pre_commit")},
        {"barrier": FailingBarrier()},
        {"hook": FailingHook("pre_commit"), "world_size": 2},
        {"hook": FailingHook("pre_commit"), "barrier": NotingBarrier(), "world_size": 2},
    ],
    ids=["pre_commit", "barrier", "pre_commit-of-an-independent-rank", "pre_commit-of-several-ranks"],
)
def test_a_failure_before_the_commit_publishes_nothing(tmp_path: Path, broken: dict[str, Any], earlier: bool) -> None:
    world_size = broken.get("world_size", 1)
    if earlier and not (world_size > 1 and "barrier" in broken):
        save(tmp_path, 1, world_size=world_size)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not today"):
        writer_of(**broken).write(str(tmp_path), state_of(2))
    assert contents(tmp_path) == before


def test_a_failing_post_commit_is_an_error_although_the_checkpoint_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="not today"):
        writer_of(hook=FailingHook("post_commit")).write(str(tmp_path), state_of(2))
    assert_state(read(tmp_path), 2)
    assert list(contents(tmp_path)) == ["checkpoint_0.pt"]


def test_a_barrier_that_fails_leaves_several_ranks_uncommitted(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    with pytest.raises(ValueError, match="not today"):
        writer_of(0, 2, FailingBarrier(ops)).write(str(tmp_path), state_of(1))
    assert steps(ops) == ["barrier"]  # once; and who has come does not abandon
    assert list(contents(tmp_path)) == ["checkpoint_0.pt"]
    with pytest.raises(UncommittedCheckpointError):
        read(tmp_path, 0, 2)
    # What was never committed may be written over.
    assert commit_together(tmp_path, 5) == [None, None]
    assert_state(read(tmp_path, 0, 2), 5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_hazard_27_the_writers_time_limit_holds_for_any_barrier(tmp_path: Path, world_size: int) -> None:
    over = threading.Event()

    class Endless(NotingBarrier):
        def execute_barrier(self) -> None:
            over.wait()

    if world_size == 1:
        save(tmp_path, 1)
    writer = writer_of(0, world_size, Endless(), write_barrier_timeout_secs=0.2)
    try:
        with pytest.raises(
            BarrierTimeoutError, match=r"rank 0 waited 0\.2 s at the barrier of the checkpoint"
        ) as caught:
            writer.write(str(tmp_path), state_of(2))
    finally:
        over.set()
    assert (caught.value.path, caught.value.rank, caught.value.phase) == (str(tmp_path), 0, "barrier")
    assert temporaries(tmp_path) == []
    if world_size == 1:
        assert_state(read(tmp_path), 1)
    else:
        with pytest.raises(UncommittedCheckpointError):
            read(tmp_path, 0, world_size)


def test_a_state_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError) as caught:
        writer_of().write(str(tmp_path / "new"), {"model": {"handle": threading.Lock()}})
    assert caught.value.tensor == "model.handle"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failing", ["state", "hook", "storage"])
def test_hazard_26_a_rank_that_fails_before_the_barrier_tells_the_others(tmp_path: Path, failing: str) -> None:
    ops = RecordingFileOps()
    barrier = NotingBarrier(ops)
    hook = FailingHook("pre_commit") if failing == "hook" else None
    state: dict[str, Any] = {"handle": threading.Lock()} if failing == "state" else state_of(1)
    if failing == "storage":
        ops.fail("fsync", 5)
    with pytest.raises((ValueError, UnsupportedStateError, StorageError)) as caught:
        writer_of(1, 3, barrier, hook, ops=ops).write(str(tmp_path), state)
    assert "barrier" not in ops.names()
    [told] = ops.of("abandon")
    assert told.arguments == (f"{type(caught.value).__name__}: {caught.value}",)


def test_a_barrier_that_cannot_tell_the_others_does_not_hide_the_failure(tmp_path: Path) -> None:
    class OnlyMeets:
        def execute_barrier(self) -> None:
            raise AssertionError("nobody should come")

    with pytest.raises(ValueError, match="not today"):
        writer_of(1, 3, OnlyMeets(), FailingHook("pre_commit")).write(str(tmp_path), state_of(1))  # type: ignore[arg-type]


# Onto what is there


def test_one_rank_replaces_its_own_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, number)
        assert_state(read(tmp_path), number)
    assert list(contents(tmp_path)) == ["checkpoint_0.pt"]


def test_independent_ranks_replace_their_own_files(tmp_path: Path) -> None:
    for number in (1, 2):
        for rank in (0, 1):
            save(tmp_path, number + rank, rank, 2)
    assert [read(tmp_path, rank, 2)["step"] for rank in (0, 1)] == [2, 3]


def committed_by_one_rank(path: Path) -> None:
    save(path, 1)


def committed_by_two_ranks(path: Path) -> None:
    assert commit_together(path, 1) == [None, None]


def independent_files_of_two(path: Path) -> None:
    save(path, 1, 0, 2)
    save(path, 1, 1, 2)


def written_by_torch(path: Path) -> None:
    path.mkdir()
    torch.save(state_of(1), path / "checkpoint_0.pt")
    torch.save(state_of(1), path / "checkpoint_1.pt")


def damaged(path: Path) -> None:
    save(path, 1)
    file = path / "checkpoint_0.pt"
    data = bytearray(file.read_bytes())
    data[data.index(b'{"format_version"')] ^= 1
    file.write_bytes(data)


EXISTING = (committed_by_one_rank, committed_by_two_ranks, independent_files_of_two, written_by_torch, damaged)
SAVERS = {
    "one rank": (1, None),
    "two independent": (2, None),
    "three independent": (3, None),
    "two": (2, NotingBarrier),
}
ALLOWED = {
    ("one rank", committed_by_one_rank),
    ("one rank", written_by_torch),
    ("one rank", damaged),
    ("two independent", independent_files_of_two),
}


@pytest.mark.parametrize("existing", EXISTING)
@pytest.mark.parametrize("saver", SAVERS)
def test_only_its_like_replaces_a_checkpoint_and_every_rank_decides_the_same(
    tmp_path: Path, existing: Any, saver: str
) -> None:
    path = tmp_path / "checkpoint"
    existing(path)
    before = contents(path)
    world_size, make_barrier = SAVERS[saver]
    for rank in reversed(range(world_size)):
        ops = RecordingFileOps()
        writer = writer_of(rank, world_size, make_barrier() if make_barrier else None, NotingHook(ops), ops=ops)
        if (saver, existing) in ALLOWED:
            writer.write(str(path), state_of(2))
            assert_state(read(path, rank, world_size), 2)
        else:
            with pytest.raises(CheckpointExistsError, match=r"nothing was written and it is untouched") as caught:
                writer.write(str(path), state_of(2))
            assert (caught.value.path, caught.value.rank) == (str(path), rank)
            assert not {"open_exclusive", "replace", "link", "pre_commit"} & set(ops.names())
            assert contents(path) == before


def test_the_refusal_says_what_is_there(tmp_path: Path) -> None:
    committed_by_two_ranks(tmp_path)
    with pytest.raises(CheckpointExistsError, match=r"the committed checkpoint of several ranks.*a save of one rank"):
        save(tmp_path, 2)


def test_a_rank_that_finds_its_own_file_in_the_way_refuses_and_tells_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1, rank=1, world_size=2)
    before = contents(tmp_path)
    meeting = threading.Barrier(2)
    writers = [writer_of(rank, 2, NotingBarrier(meeting=meeting)) for rank in (0, 1)]
    outcomes = finished([start(writer.write, str(tmp_path), state_of(2)) for writer in writers])
    assert isinstance(outcomes[1], CheckpointExistsError)
    assert isinstance(outcomes[0], threading.BrokenBarrierError)
    assert contents(tmp_path)["checkpoint_1.pt"] == before["checkpoint_1.pt"]
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_leftovers_of_a_save_that_never_finished_are_written_over(tmp_path: Path, world_size: int) -> None:
    """Rank 0 of two published its file, and rank 1 died before it came."""
    with pytest.raises(ValueError, match="not today"):
        writer_of(0, 2, FailingBarrier()).write(str(tmp_path), state_of(9))
    if world_size == 1:
        save(tmp_path, 1)
    else:
        assert commit_together(tmp_path, 1, world_size) == [None] * world_size
    assert_state(read(tmp_path, 0, world_size), 1)


def test_one_rank_saves_over_a_file_it_may_not_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    ops = RecordingFileOps()
    ops.fail("open_read", 13)
    writer_of(ops=ops).write(str(tmp_path), state_of(2))
    assert_state(read(tmp_path), 2)
    with pytest.raises(StorageError, match="permission denied"):
        writer_of(0, 2, ops=ops).write(str(tmp_path), state_of(3))


# Several ranks, when things go wrong around the commit


def test_a_checkpoint_committed_meanwhile_by_another_job_is_not_touched(tmp_path: Path) -> None:
    """Hazard 29: a job left over from before a restart writes to the same path."""

    class CommitsFirst(WriterHook):
        def pre_commit(self, path: str, **kwargs: Any) -> None:
            committed_by_two_ranks(tmp_path)

        def post_commit(self, path: str, **kwargs: Any) -> None:
            raise AssertionError("there is nothing to be told of")

    with pytest.raises(CheckpointExistsError, match="committed by another job while rank 1 was saving"):
        writer_of(1, 2, NotingBarrier(), CommitsFirst()).write(str(tmp_path), state_of(7))
    assert [read(tmp_path, rank, 2)["step"] for rank in (0, 1)] == [1, 2]
    assert temporaries(tmp_path) == []


class ActsAtTheBarrier(NotingBarrier):
    def __init__(self, action: Any) -> None:
        super().__init__()
        self.action = action

    def execute_barrier(self) -> None:
        self.action()


def test_rank_0_never_replaces_a_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"

    def come_and_commit_something_else() -> None:
        with pytest.raises(ValueError, match="not today"):
            writer_of(1, 2, FailingBarrier()).write(str(tmp_path), state_of(1))
        manifest.write_bytes(b"somebody else's")

    with pytest.raises(CheckpointExistsError, match=r"manifest\.json exists already"):
        writer_of(0, 2, ActsAtTheBarrier(come_and_commit_something_else)).write(str(tmp_path), state_of(1))
    assert manifest.read_bytes() == b"somebody else's"


def another_world_size(path: Path) -> None:
    with pytest.raises(ValueError, match="not today"):
        writer_of(1, 3, FailingBarrier()).write(str(path), state_of(1))


def another_rank(path: Path) -> None:
    (path / "checkpoint_0.pt").rename(path / "checkpoint_1.pt")
    with pytest.raises(ValueError, match="not today"):
        writer_of(0, 2, FailingBarrier()).write(str(path), state_of(1))


def not_ours(path: Path) -> None:
    torch.save(state_of(1), path / "checkpoint_1.pt")


def rank_0_of_another_save(path: Path) -> None:
    for rank in (0, 1):
        with pytest.raises(ValueError, match="not today"):
            writer_of(rank, 2, FailingBarrier()).write(str(path), state_of(1))


@pytest.mark.parametrize("intruder", [another_world_size, another_rank, not_ours, rank_0_of_another_save])
def test_files_of_two_saves_are_never_committed_together(tmp_path: Path, intruder: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"is not the file that rank \d wrote in this save"):
        writer_of(0, 2, ActsAtTheBarrier(lambda: intruder(tmp_path))).write(str(tmp_path), state_of(1))
    assert not (tmp_path / "manifest.json").exists()


def test_files_of_two_saves_mixed_afterwards_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        assert commit_together(path, 1) == [None, None]
    # The same state, the same size: only the save differs.
    (second / "checkpoint_1.pt").replace(first / "checkpoint_1.pt")
    assert_state(read(first, 0, 2), 1)
    with pytest.raises(CorruptCheckpointError, match="belongs to another save"):
        read(first, 1, 2)


def test_without_rank_0s_manifest_the_others_fail_in_time(tmp_path: Path) -> None:
    writer = writer_of(1, 2, NotingBarrier(), write_barrier_timeout_secs=0.2)
    with pytest.raises(
        UncommittedCheckpointError, match=r"rank 0 did not publish .*manifest\.json within 0\.2 s"
    ) as caught:
        writer.write(str(tmp_path), state_of(1))
    assert (caught.value.path, caught.value.rank, caught.value.phase) == (str(tmp_path), 1, "commit")


@pytest.mark.parametrize("world_size", [1, 2], ids=["of fewer ranks", "of as many ranks"])
def test_the_manifest_of_another_save_does_not_pass_for_this_ones(tmp_path: Path, world_size: int) -> None:
    def commit_another() -> None:
        assert commit_together(tmp_path / "other", 1, 2) == [None, None]
        (tmp_path / "other" / "manifest.json").rename(tmp_path / "checkpoint" / "manifest.json")

    rank = 3 - world_size
    writer = writer_of(rank, rank + 1, ActsAtTheBarrier(commit_another))
    with pytest.raises(UncommittedCheckpointError, match="that of another save"):
        writer.write(str(tmp_path / "checkpoint"), state_of(1))


@pytest.mark.parametrize("size", [3, MAX_MANIFEST_SIZE + 1])
def test_a_damaged_manifest_is_said_to_be_one(tmp_path: Path, size: int) -> None:
    def damage() -> None:
        (tmp_path / "manifest.json").write_bytes(b"{}\n")
        os.truncate(tmp_path / "manifest.json", size)

    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json is damaged"):
        writer_of(1, 2, ActsAtTheBarrier(damage)).write(str(tmp_path), state_of(1))


# Making a writer


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be_are_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} of {world_size}"):
        CheckpointWriter(CheckpointWriterConfig(), RankInfo(rank, world_size))


@pytest.mark.parametrize("name", ["write_barrier_timeout_secs", "no_progress_timeout_secs"])
@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_time_limits_that_cannot_be_are_refused(name: str, seconds: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is "):
        writer_of(**{name: seconds})


def test_a_hook_must_have_both_methods() -> None:
    class Half(WriterHook):
        def pre_commit(self, path: str, **kwargs: Any) -> None:
            pass

    with pytest.raises(TypeError, match="post_commit"):
        Half()  # type: ignore[abstract]
