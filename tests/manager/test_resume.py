"""Hazard 22: resume goes on from the newest checkpoint that is whole, whatever else is there, and loops on none."""

import errno
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.saves import assert_state, contents
from tests.manager.runs import (
    ELEMENTS,
    assert_resumes,
    damage,
    directories,
    failing_ops,
    file_of,
    flip,
    lock_of,
    logged,
    make_run,
    manager_of,
    restore,
    tiny,
)
from tests.storage.recording import RecordingFileOps
from tests.unit.loading.files import archive_of

import lastgood
from lastgood.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingKeysError,
    StorageError,
    TargetMismatchError,
)
from lastgood.manager import restoring
from lastgood.manager.catalog import Catalog, Entry, read_catalog, read_entry
from lastgood.manager.resume import PassedOver, set_damaged_aside
from lastgood.manager.retention import KeepLast
from lastgood.manager.run_log import RestoreRecord, SaveRecord, SetAsideRecord, read_run_log
from lastgood.storage.local import LocalStorage

RECORDS = [
    "data.pkl",
    "version",
    "byteorder",
    "data/0",
    "data/1",
    ".lastgood/index.json",
    ".lastgood/blocks.crc32",
    ".lastgood/trailer",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", [10, 20, 30])
    return tmp_path / "run"


def assert_falls_back(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the damaged step 30 to step 20, said in every way there is; and the next time, at once."""
    damaged = contents(root / "step-30")
    with manager_of(root) as manager, caplog.at_level(logging.WARNING, "lastgood"):
        found, state = restore(manager)
        assert found == 20
        assert_state(state, 20, ELEMENTS)
        assert [(passed.step, passed.is_damaged) for passed in manager.passed_over] == [(30, True)]
        problem = manager.passed_over[0].problem
        assert manager.steps() == [10, 20]
    assert "step 30 is passed over" in caplog.text
    assert "step 30 is set aside as step-30.set-aside" in caplog.text
    assert directories(root) == ["step-10", "step-20", "step-30.set-aside"]
    assert contents(root / "step-30.set-aside") == damaged
    assert [(r.step, r.passed_over[0].step, r.passed_over[0].problem) for r in logged(root, RestoreRecord)] == [
        (20, 30, problem)
    ]
    assert [(r.step, r.name, r.problem) for r in logged(root, SetAsideRecord)] == [(30, "step-30.set-aside", problem)]
    assert assert_resumes(root, 20) == ()


@pytest.mark.parametrize("record", RECORDS)
def test_hazard_22_a_flipped_byte_in_any_record_is_fallen_back_from(
    root: Path, caplog: pytest.LogCaptureFixture, rng_seed: int, record: str
) -> None:
    with archive_of(file_of(root, 30)) as archive:
        (place,) = [place for place in archive.layout.records if place.name == f"archive/{record}"]
    offset = random.Random(rng_seed).randrange(place.data_offset, place.data_end)
    flip(file_of(root, 30), offset, 1 << rng_seed % 8)
    print("flipped at", offset)
    assert_falls_back(root, caplog)


def test_hazard_22_a_flipped_byte_anywhere_is_fallen_back_from(root: Path, rng_seed: int) -> None:
    """In the zip's structure, and in the pickle that is there for torch.load, too."""
    rng = random.Random(rng_seed)
    good = file_of(root, 30).read_bytes()
    for offset in rng.sample(range(len(good)), 40):
        flip(file_of(root, 30), offset, 1 << rng.randrange(8))
        assert assert_resumes(root, 20) == (30,), offset
        shutil.move(root / "step-30.set-aside", root / "step-30")
        file_of(root, 30).write_bytes(good)


def test_hazard_22_damage_of_what_is_not_asked_for_is_fallen_back_from(root: Path) -> None:
    """A run that restores a part of its state must not go on from what is damaged elsewhere."""
    damage(file_of(root, 30))
    with manager_of(root) as manager:
        assert manager.restore({"step": 0}) == 20


def _truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(1, file.stat().st_size))


def _append(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def _lose_the_end(file: Path, rng: random.Random) -> None:
    """As file systems do that keep the length, and not the data, through a power cut."""
    kept = rng.randrange(file.stat().st_size // 2)
    file.write_bytes(file.read_bytes()[:kept] + bytes(file.stat().st_size - kept))


def _half_of_torchs(file: Path, rng: random.Random) -> None:
    torch.save(tiny(30), file)
    _truncate(file, rng)


RUINED: dict[str, Callable[[Path, random.Random], object]] = {
    "truncated": _truncate,
    "empty": lambda file, rng: file.write_bytes(b""),
    "longer": _append,
    "without its end": _lose_the_end,
    "noise": lambda file, rng: file.write_bytes(rng.randbytes(3000)),
    "text": lambda file, rng: file.write_text("latest: step-30\n"),
    "half of a file of torch's": _half_of_torchs,
    "beside a manifest of another": lambda file, rng: (file.parent / "manifest.json").write_text('{"manifest": 1}'),
}


@pytest.mark.parametrize("ruin", RUINED.values(), ids=RUINED)
def test_hazard_22_a_ruined_file_is_fallen_back_from(
    root: Path, caplog: pytest.LogCaptureFixture, rng_seed: int, ruin: Callable[[Path, random.Random], object]
) -> None:
    ruin(file_of(root, 30), random.Random(rng_seed))
    assert_falls_back(root, caplog)


def test_several_damaged_ones_are_all_set_aside_beside_earlier_ones(root: Path) -> None:
    shutil.copytree(root / "step-30", root / "step-30.set-aside")
    for step in (20, 30):
        damage(file_of(root, step))
    assert assert_resumes(root, 10) == (30, 20)
    assert directories(root) == ["step-10", "step-20.set-aside", "step-30.set-aside", "step-30.set-aside-2"]
    # What was set aside is no longer there: its step can be saved again, and is then resumed from.
    with manager_of(root, keep=KeepLast(1)) as manager:
        manager.save(20, tiny(21))
    assert assert_resumes(root, 20, 21) == ()
    assert directories(root) == ["step-20", "step-20.set-aside", "step-30.set-aside", "step-30.set-aside-2"]


def test_a_directory_in_the_files_place_is_passed_over_and_left_alone(root: Path) -> None:
    """Nobody knows what it is: the system's word that it cannot be read is no proof of damage."""
    file_of(root, 30).unlink()
    file_of(root, 30).mkdir()
    assert assert_resumes(root, 20) == (30,)
    assert directories(root) == ["step-10", "step-20", "step-30"]
    assert assert_resumes(root, 20) == (30,)


def test_a_file_of_torchs_with_the_same_keys_is_resumed_from(root: Path) -> None:
    torch.save(tiny(31), file_of(root, 30))
    assert assert_resumes(root, 30, 31) == ()


@pytest.mark.parametrize(
    "other",
    [{"something": "else"}, [1, 2], {**tiny(30), "model": {"weights": torch.zeros(3), "bias": torch.zeros(10)}}],
    ids=["keys", "no dict", "shapes"],
)
def test_hazard_22_a_file_of_torchs_that_holds_something_else_is_passed_over(root: Path, other: object) -> None:
    torch.save(other, file_of(root, 30))
    assert assert_resumes(root, 20) == (30,)
    assert directories(root) == ["step-10", "step-20", "step-30"]


def test_a_file_of_torchs_that_needs_code_to_run_is_passed_over(root: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), file_of(root, 30))
    assert assert_resumes(root, 20) == (30,)


def test_a_state_of_another_shape_than_the_newest_is_an_error_and_not_damage(root: Path) -> None:
    """Falling back would not help, and training on from an older one would hide the mistake."""
    before = contents(root)
    with manager_of(root) as manager:
        with pytest.raises(TargetMismatchError, match=r"model\.weights"):
            manager.restore({**tiny(0), "model": {"weights": torch.zeros(3), "bias": torch.zeros(10)}})
        with pytest.raises(MissingKeysError, match="ema"):
            manager.restore({**tiny(0), "ema": torch.zeros(3)})
        manager.wait()
    assert {name: data for name, data in contents(root).items() if name in before and name != "lastgood.jsonl"} == {
        name: data for name, data in before.items() if name != "lastgood.jsonl"
    }


def test_when_all_are_damaged_it_raises_and_changes_nothing(root: Path) -> None:
    for step in (10, 20, 30):
        damage(file_of(root, step))
    before = contents(root)
    for _ in range(2):
        with manager_of(root) as manager, pytest.raises(CorruptCheckpointError) as caught:
            restore(manager)
        for word in ("step 10", "step 20", "step 30", "Everything is still there", "lastgood doctor"):
            assert word in str(caught.value)
    after = contents(root)
    assert after.pop("lastgood.jsonl").startswith(before.pop("lastgood.jsonl"))
    assert after == before
    assert directories(root) == ["step-10", "step-20", "step-30"]
    assert logged(root, SetAsideRecord) == []


def test_where_there_is_nothing_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    with manager_of(tmp_path / "new") as manager:
        found, state = restore(manager)
        assert found is None
        assert_state(state, 987_654, ELEMENTS)  # untouched
        assert (manager.steps(), manager.latest(), manager.passed_over) == ([], None, ())


def test_only_unfinished_saves_are_nothing_to_resume_from(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-20" / ".checkpoint_0.pt.0123456789abcdef.tmp").write_bytes(b"half")
    with manager_of(tmp_path) as manager:
        found, _ = restore(manager)
        assert found is None
        assert [(passed.step, passed.is_damaged) for passed in manager.passed_over] == [(20, False), (10, False)]
    assert directories(tmp_path) == ["step-10", "step-20"]


FOREIGN = [
    "latest",
    "step-100.backup",
    "step-007",
    "step-+7",
    "step-5",
    "Step-50",
    "step-60 ",
    "xstep-70",
    "step-80.pt",
]


def test_hazard_08_and_22_hints_and_names_that_are_not_ours_are_neither_believed_nor_touched(root: Path) -> None:
    (root / "latest").write_text("step-10")
    (root / "latest_checkpointed_iteration.txt").write_text("999")
    for name in FOREIGN[1:]:
        if name != "step-5":
            shutil.copytree(root / "step-10", root / name)
    (root / "step-5").write_text("a file, of somebody's notes")
    (root / "step-9").symlink_to("nowhere")
    damage(root / "step-100.backup" / "checkpoint_0.pt")
    before = {name: data for name, data in contents(root).items() if name.split("/")[0] in FOREIGN}
    assert assert_resumes(root, 30) == ()
    with manager_of(root, keep=KeepLast(1)) as manager:
        manager.save(40, tiny(40))
        manager.wait()
        assert manager.steps() == [40]
    after = contents(root)
    assert {name: after[name] for name in before} == before
    assert {"latest", "latest_checkpointed_iteration.txt", "step-9", *FOREIGN} <= set(directories(root))
    assert "step-10" not in directories(root)


@pytest.mark.parametrize("name", ["step-99", "step-999999999999999999"])
def test_hazard_22_a_file_under_the_name_of_a_newer_step_does_not_keep_a_run_from_resuming(
    root: Path, name: str
) -> None:
    (root / name).write_text("not a directory")
    assert assert_resumes(root, 30) == ()
    assert (root / name).read_text() == "not a directory"


def test_hazard_22_a_link_that_leads_nowhere_does_not_keep_a_run_from_resuming(root: Path) -> None:
    (root / "step-99").symlink_to("/nonexistent/elsewhere")
    assert assert_resumes(root, 30) == (99,)
    assert (root / "step-99").is_symlink()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_change_of_the_working_directory_does_not_split_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with manager_of("run", asynchronous=asynchronous, keep=KeepLast(1)) as manager:
        manager.save(10, tiny(10))
        monkeypatch.chdir(tmp_path / "elsewhere")
        manager.save(20, tiny(20))
        manager.wait()
        assert manager.steps() == [20]
        assert restore(manager)[0] == 20
    assert directories(tmp_path) == ["elsewhere", "run"]
    assert directories(tmp_path / "elsewhere") == []
    assert directories(tmp_path / "run") == ["step-20"]


# An explicit step


def test_a_step_that_is_asked_for_is_restored_and_later_ones_are_warned_of(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with manager_of(root) as manager:
        with caplog.at_level(logging.WARNING, "lastgood"):
            found, state = restore(manager, 10)
        assert found == 10
        assert_state(state, 10, ELEMENTS)
        assert "20, 30" in caplog.text
        assert "set_aside()" in caplog.text
        caplog.clear()
        restore(manager, 30)
        assert "later" not in caplog.text


def test_a_step_that_is_asked_for_and_damaged_is_an_error_and_stays_where_it_is(root: Path) -> None:
    damage(file_of(root, 20))
    before = contents(root / "step-20")
    with manager_of(root) as manager:
        with pytest.raises(CorruptCheckpointError, match="step-20"):
            restore(manager, 20)
        for step in (15, 40):
            with pytest.raises(CheckpointNotFoundError, match=f"step-{step}"):
                restore(manager, step)
    assert contents(root / "step-20") == before
    assert directories(root) == ["step-10", "step-20", "step-30"]


def test_a_checkpoint_can_be_set_aside_on_request(root: Path) -> None:
    before = contents(root / "step-30")
    with manager_of(root) as manager:
        manager.set_aside(30)
        assert manager.latest() == 20
        with pytest.raises(CheckpointNotFoundError):
            manager.set_aside(30)
    assert contents(root / "step-30.set-aside") == before
    assert [record.name for record in logged(root, SetAsideRecord)] == ["step-30.set-aside"]
    assert assert_resumes(root, 20) == ()


# Disks that refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_hazard_22_a_disk_that_cannot_be_written_to_does_not_keep_a_run_from_resuming(
    root: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the damaged one that cannot be set aside nor the unfinished one that cannot be locked is in the way."""
    damage(file_of(root, 30))
    (root / "step-40").mkdir()
    ops = failing_ops("rename_without_replacing", number)
    for name in ("open_exclusive", "open_write", "open_append", "replace", "make_directory"):
        ops.fail(name, number)
    with manager_of(root, ops=ops) as manager:
        found, state = restore(manager)
        assert found == 20
        assert_state(state, 20, ELEMENTS)
        assert [passed.step for passed in manager.passed_over] == [40, 30]
    assert "step 30" in caplog.text
    assert directories(root) == ["step-10", "step-20", "step-30", "step-40"]


def test_a_root_that_cannot_be_listed_is_an_error_and_not_a_new_beginning(root: Path) -> None:
    with manager_of(root, ops=failing_ops("list_directory", errno.EIO)) as manager, pytest.raises(StorageError):
        restore(manager)


def test_a_checkpoint_whose_data_the_disk_does_not_give_is_passed_over_and_left_alone(root: Path) -> None:
    """It may be the network: what is there is tried again by the next run."""
    newest = str(file_of(root, 30))
    ops = failing_ops("open_read", errno.EIO)
    ops.replace_call("open_read", lambda real, path: _refuse([newest], real, path))
    with manager_of(root, ops=ops) as manager:
        found, state = restore(manager)
        assert found == 20
        assert_state(state, 20, ELEMENTS)
        assert [(passed.step, passed.is_damaged) for passed in manager.passed_over] == [(30, False)]
    assert assert_resumes(root, 30) == ()


def test_when_the_disk_gives_none_of_them_it_says_so_and_speaks_of_no_damage(root: Path) -> None:
    with manager_of(root, ops=failing_ops("open_read", errno.EIO)) as manager, pytest.raises(StorageError) as caught:
        restore(manager)
    for word in ("step 10", "step 20", "step 30", "None is known to be damaged"):
        assert word in str(caught.value)
    damage(file_of(root, 10))
    ops = failing_ops("open_read", errno.EIO)
    newer = [str(file_of(root, step)) for step in (20, 30)]
    ops.replace_call("open_read", lambda real, path: _refuse(newer, real, path))
    with manager_of(root, ops=ops) as manager, pytest.raises(CorruptCheckpointError):
        restore(manager)
    assert assert_resumes(root, 30) == ()


def _refuse(refused: list[str], real: Callable[[str], int], path: str) -> int:
    if path in refused:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(path)


def test_files_of_other_savers_of_lastgood_are_resumed_from(tmp_path: Path) -> None:
    """A checkpointer without a manager notes no step and no time: that is none of resume's business."""
    lastgood.make_sync_checkpointer().save(str(tmp_path / "step-7"), tiny(7))
    assert assert_resumes(tmp_path, 7) == ()


def test_hazard_22_a_copy_under_another_steps_name_is_not_that_step(root: Path) -> None:
    shutil.copytree(root / "step-10", root / "step-99")
    (root / "step-98").symlink_to(root / "step-20")
    assert assert_resumes(root, 30) == (99, 98)
    assert {"step-98", "step-99"} <= set(directories(root))
    with manager_of(root, keep=KeepLast(1)) as manager:
        assert [verdict.entry.step for verdict in manager.prune(dry_run=True).removed] == [10, 20]
        assert restore(manager, 99)[0] == 99  # Asked for, it is what was asked for.


def test_nothing_is_removed_on_the_strength_of_a_newest_checkpoint_that_is_damaged(root: Path) -> None:
    damage(file_of(root, 30))
    with manager_of(root, keep=KeepLast(1)) as manager:
        with pytest.raises(CorruptCheckpointError, match="nothing was removed"):
            manager.prune()
        assert manager.steps() == [10, 20, 30]
        assert restore(manager)[0] == 20
        assert [verdict.entry.step for verdict in manager.prune().removed] == [10]
    assert_resumes(root, 20)


def test_a_line_of_the_log_that_a_full_disk_cut_short_costs_no_other(tmp_path: Path) -> None:
    ops = RecordingFileOps()
    with manager_of(tmp_path, ops=ops) as manager:
        manager.save(1, tiny(1))
        manager.wait()

        def pwrite(real: Any, descriptor: int, data: memoryview, offset: int) -> int:
            if not ops.paths[descriptor].endswith("lastgood.jsonl"):
                return int(real(descriptor, data, offset))
            if began:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            began.append(True)
            return int(real(descriptor, data[:20], offset))

        began: list[bool] = []
        ops.replace_call("pwrite", pwrite)
        manager.save(2, tiny(2))
        manager.wait()
        ops.heal("pwrite")
        manager.save(3, tiny(3))
    records = read_run_log(LocalStorage(), str(tmp_path))
    assert [record.step for record in records if isinstance(record, SaveRecord)] == [1, 3]


def test_one_directory_that_cannot_be_listed_hides_no_other(root: Path) -> None:
    ops = RecordingFileOps()

    def list_directory(real: Any, path: str) -> Any:
        if path.endswith("step-30"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    ops.replace_call("list_directory", list_directory)
    with manager_of(root, ops=ops, keep=KeepLast(1)) as manager:
        assert manager.steps() == [10, 20]
        assert restore(manager)[0] == 20
        assert [verdict.entry.step for verdict in manager.prune().removed] == [10]
    assert_resumes(root, 30)


def sorted_newest_first(catalog: Catalog) -> list[Entry]:
    return sorted(catalog.entries, key=lambda entry: -entry.step)


def test_what_was_saved_anew_since_it_was_found_damaged_is_not_set_aside(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(file_of(root, 30))
    ops = RecordingFileOps()
    saved: list[int] = []

    def open_read(real: Any, path: str) -> Any:
        if "step-20" in path and not saved:  # The load of the one before has begun.
            saved.append(30)
            with manager_of(root) as other:
                other.save(30, tiny(31))
        return real(path)

    with manager_of(root, ops=ops) as manager:
        assert manager.steps() == [10, 20, 30]
        catalog = read_catalog(LocalStorage(), str(root))
        ops.replace_call("open_read", open_read)
        with monkeypatch.context() as patch:
            patch.setattr(restoring, "find_candidates", lambda *_, **__: sorted_newest_first(catalog))
            found, _ = restore(manager)
    assert saved
    assert found == 20
    assert "step-30" in directories(root)
    assert_resumes(root, 30, 31)


def test_what_somebody_is_writing_anew_is_not_set_aside(root: Path) -> None:
    storage = LocalStorage()
    damaged = PassedOver(30, "damaged", is_damaged=True, save_id=read_entry(storage, str(root), 30).save_id)
    with lock_of(root, 30):
        assert set_damaged_aside(storage, str(root), damaged) is None
        assert directories(root) == ["step-10", "step-20", "step-30"]
    assert set_damaged_aside(storage, str(root), damaged) == "step-30.set-aside"
