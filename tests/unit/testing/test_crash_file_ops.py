"""The file system whose power is cut: it behaves as the real one does, and loses exactly what it says."""

import errno
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.errors import StorageError
from lastgood.storage._direct_io import aligned_buffer
from lastgood.storage.base import StorageBackend
from lastgood.storage.file_ops import FileOps, OsFileOps
from lastgood.storage.local import LocalStorage
from lastgood.testing import CrashFileOps
from lastgood.testing.storage_backend_tests import StorageBackendTests

PAGE = 4096


class TestLocalStorageOnIt(StorageBackendTests):
    def make_backend(self, tmp_path: Path) -> tuple[StorageBackend, str]:
        return LocalStorage(CrashFileOps()), "/some/place"


class TestLocalStorageOnItWithoutDirectIO(StorageBackendTests):
    def make_backend(self, tmp_path: Path) -> tuple[StorageBackend, str]:
        return LocalStorage(CrashFileOps(has_direct_io=False)), "/some/place"


def file_with(ops: CrashFileOps, path: str, data: bytes = b"") -> int:
    """A new file, whose descriptor stays open."""
    descriptor = ops.open_exclusive(path)
    if data:
        ops.pwrite(descriptor, memoryview(data), 0)
    return descriptor


def certain_file(ops: CrashFileOps, path: str, data: bytes = b"") -> int:
    descriptor = file_with(ops, path, data)
    ops.fsync(descriptor)
    ops.fsync_directory(os.path.dirname(path) or "/")
    return descriptor


def everything_in(ops: CrashFileOps) -> list[tuple[str, bytes | None]]:
    """Every path, with the bytes of files, and ``None`` for directories."""
    image = ops._tree.image()
    return sorted((path, image.files.get(number)) for path, number in image.tree().items())


def states(ops: CrashFileOps, path: str | None = None) -> set[Any]:
    """What may be there when the power is cut now: the bytes at ``path`` (``None``: no such file), or all paths."""
    found = [state.contents() for state in ops.all_states(ops.operation_count)]
    return {frozenset(each) if path is None else each.get(path) for each in found}


# It behaves as the real one does

NAMES = st.sampled_from(["a", "b", "d", "d/x", "d/y", "d/x/z", "e", "e/x", "d/../a", "n" * 256])
PLACES = st.one_of(NAMES, st.sampled_from(["", ".", "d/..", "a/.."]))
CALLS = st.one_of(
    st.tuples(
        st.sampled_from(["open_exclusive", "open_read", "open_write", "open_append", "unlink", "make_directory"]), NAMES
    ),
    st.tuples(st.just("remove_directory"), NAMES),
    st.tuples(st.sampled_from(["list_directory", "fsync_directory", "status"]), PLACES),
    st.tuples(st.sampled_from(["link", "replace", "rename_without_replacing"]), NAMES, NAMES),
    st.tuples(st.sampled_from(["close", "fsync", "status", "lock", "lock_shared"]), st.integers(0, 7)),
    st.tuples(st.sampled_from(["reserve", "truncate"]), st.integers(0, 7), st.sampled_from([-1, 0, 5, 9000])),
    st.tuples(
        st.just("pwrite"), st.integers(0, 7), st.binary(max_size=9).map(lambda data: data * 700), st.integers(0, 9000)
    ),
    st.tuples(st.just("pread_into"), st.integers(0, 7), st.integers(0, 9000), st.integers(0, 9000)),
)

TO_BEGIN_WITH = [
    ("make_directory", "d"),
    ("make_directory", "e"),
    ("open_exclusive", "a"),
    ("open_exclusive", "d/x"),
    ("open_read", "a"),
    ("open_read", "d"),
]


class Player:
    """Makes calls on paths under a root, or on the n-th file that it has opened.

    It tells what came of them in words that do not depend on the file system.
    """

    def __init__(self, ops: FileOps, root: str) -> None:
        self.ops = ops
        self.root = root
        self.descriptors: list[int | None] = []
        self.numbers: dict[tuple[int, int], int] = {}

    def play(self, name: str, *arguments: Any) -> Any:
        given = [os.path.join(self.root, each) if isinstance(each, str) else each for each in arguments]
        if isinstance(given[0], int):
            number = given[0]
            if number >= len(self.descriptors) or self.descriptors[number] is None:
                return None
            given[0] = self.descriptors[number]
            if name == "close":
                self.descriptors[number] = None
        try:
            return self._call(name, given)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def _call(self, name: str, given: list[Any]) -> Any:
        if name == "pread_into":
            target = bytearray(given[1])
            return bytes(target[: self.ops.pread_into(given[0], memoryview(target), given[2])])
        if name == "pwrite":
            return self.ops.pwrite(given[0], memoryview(given[1]), given[2])
        result = getattr(self.ops, name)(*given)
        if name.startswith("open_"):
            self.descriptors.append(result)
            return "opened"
        if name == "list_directory":
            return sorted(result)
        if name == "status":
            number = self.numbers.setdefault(result.identity, len(self.numbers))
            return (result.is_file, result.is_directory, result.size if result.is_file else None, number)
        return result

    def close(self) -> None:
        for descriptor in self.descriptors:
            if descriptor is not None:
                self.ops.close(descriptor)


@settings(max_examples=100)
@given(calls=st.lists(CALLS, max_size=25))
def test_every_call_ends_as_on_the_real_file_system(
    calls: list[tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("root")
    simulated = CrashFileOps()
    simulated.make_directory("/root")
    players = [Player(OsFileOps(), str(root)), Player(simulated, "/root")]
    try:
        for name, *arguments in (*TO_BEGIN_WITH, *calls):
            real, ours = [player.play(name, *arguments) for player in players]
            assert ours == real, (name, arguments)
    finally:
        for player in players:
            player.close()
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path.removeprefix("/root/"): data for path, data in simulated.contents().items()} == found


def test_a_file_without_a_name_lives_as_long_as_somebody_has_it_open() -> None:
    ops = CrashFileOps(capacity=2 * PAGE)
    descriptor = file_with(ops, "/file", b"abc")
    ops.unlink("/file")
    target = bytearray(3)
    assert ops.pread_into(descriptor, memoryview(target), 0) == 3
    assert target == b"abc"
    assert ops.available_bytes("/") == PAGE
    ops.close(descriptor)
    assert ops.available_bytes("/") == 2 * PAGE
    with pytest.raises(OSError, match="Bad file descriptor"):
        ops.close(descriptor)


def test_there_is_room_for_so_much_and_no_more() -> None:
    ops = CrashFileOps(capacity=3 * PAGE)
    descriptor = file_with(ops, "/file", b"abc")
    assert ops.available_bytes("/") == 2 * PAGE
    with pytest.raises(OSError, match="No space left"):
        ops.reserve(descriptor, 4 * PAGE)
    assert ops.contents() == {"/file": b"abc"}
    ops.truncate(descriptor, 10 * PAGE)  # which takes no space
    assert ops.pwrite(descriptor, memoryview(bytes(4 * PAGE)), PAGE) == 2 * PAGE
    with pytest.raises(OSError, match="No space left"):
        ops.pwrite(descriptor, memoryview(b"x"), 5 * PAGE)
    ops.capacity = 4 * PAGE
    assert ops.pwrite(descriptor, memoryview(b"x"), 5 * PAGE) == 1
    ops.truncate(descriptor, 0)
    assert ops.available_bytes("/") == 4 * PAGE
    ops.capacity = None
    assert ops.available_bytes("/") is None
    ops.close(descriptor)


def test_storage_says_early_that_there_is_no_room() -> None:
    ops = CrashFileOps(capacity=10 * PAGE)
    storage = LocalStorage(ops)
    storage.put("/file", bytes(4 * PAGE))
    with pytest.raises(StorageError, match="not enough space"):
        storage.put("/other", bytes(7 * PAGE))
    assert list(ops.contents()) == ["/file"]


def test_direct_io_is_aligned_or_refused() -> None:
    ops = CrashFileOps()
    ops.close(file_with(ops, "/file", bytes(PAGE)))
    descriptor = ops.open_direct("/file", write=True)
    buffer = aligned_buffer(2 * PAGE)
    assert ops.pwrite(descriptor, buffer, 0) == 2 * PAGE
    for data, offset in ((buffer[:100], 0), (buffer[:PAGE], 100), (buffer[100 : 100 + PAGE], 0)):
        with pytest.raises(OSError, match="Invalid argument"):
            ops.pwrite(descriptor, data, offset)
    ops.close(descriptor)
    with pytest.raises(OSError, match="Invalid argument"):
        CrashFileOps(has_direct_io=False).open_direct("/file", write=False)


# It loses exactly what it says


def test_bytes_are_certain_once_their_file_is_synced_and_each_page_by_itself() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"a" * (2 * PAGE))
    assert states(ops, "/file") == {b"a" * (2 * PAGE)}
    ops.pwrite(descriptor, memoryview(b"b" * (PAGE + 2)), PAGE - 1)
    old, new = [b"a" * PAGE, b"a" * PAGE], [b"a" * (PAGE - 1) + b"b", b"b" * PAGE, b"b"]
    pages = [*itertools.product((old[0], new[0]), (old[1], new[1]))]
    lengths = {b"".join(each) for each in pages}
    longer = {b"".join(each) + last for each in pages for last in (b"\0", b"b")}
    assert states(ops, "/file") == lengths | longer
    ops.fsync(descriptor)
    assert states(ops, "/file") == {b"".join(new)}
    ops.close(descriptor)


def test_of_writes_that_overlap_any_may_be_the_last() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"....")
    ops.pwrite(descriptor, memoryview(b"aaa"), 0)
    ops.pwrite(descriptor, memoryview(b"bbb"), 1)
    assert states(ops, "/file") == {b"....", b"aaa.", b".bbb", b"abbb", b"aaab"}
    ops.fsync(descriptor)
    assert states(ops, "/file") == {b"abbb"}
    ops.close(descriptor)


def test_a_file_has_any_length_that_it_had_since_it_was_synced() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"abcdef")
    ops.truncate(descriptor, 2)
    ops.reserve(descriptor, 4)
    # What was cut off is zeros or what it was.
    assert states(ops, "/file") == {b"abcdef", b"ab\0\0\0\0", b"ab", b"abcd", b"ab\0\0"}
    ops.fsync(descriptor)
    assert states(ops, "/file") == {b"ab\0\0"}
    ops.close(descriptor)


def test_an_fsync_that_fails_tells_so_once_and_the_next_makes_nothing_certain() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"old")
    ops.fail_fsync()
    ops.pwrite(descriptor, memoryview(b"newer"), 0)
    with pytest.raises(OSError, match="Input/output error"):
        ops.fsync(descriptor)
    ops.fsync(descriptor)
    assert states(ops, "/file") == {b"old", b"new", b"old\0\0", b"newer"}
    target = bytearray(5)  # whoever reads it does not see that
    ops.close(descriptor)
    descriptor = ops.open_write("/file")
    assert ops.pread_into(descriptor, memoryview(target), 0) == 5
    assert target == b"newer"
    # What is written now is as certain as ever.
    ops.pwrite(descriptor, memoryview(b"!"), 5)
    ops.fsync(descriptor)
    assert states(ops, "/file") == {b"old\0\0!", b"newer!"}
    ops.close(descriptor)


def test_a_failure_may_be_put_off() -> None:
    ops = CrashFileOps()
    descriptor = file_with(ops, "/file")
    ops.fail_fsync(after=1)
    ops.fsync_directory("/")  # only those of files count
    ops.fsync(descriptor)
    with pytest.raises(OSError, match="Input/output error"):
        ops.fsync(descriptor)
    ops.fsync(descriptor)
    ops.close(descriptor)


def test_a_name_is_certain_once_its_directory_is_synced_and_not_before() -> None:
    ops = CrashFileOps()
    descriptor = file_with(ops, "/file", b"abc")
    ops.fsync(descriptor)
    assert states(ops) == {frozenset(), frozenset({"/file"})}
    ops.fsync_directory("/")
    assert states(ops) == {frozenset({"/file"})}
    ops.unlink("/file")
    ops.close(descriptor)
    assert states(ops) == {frozenset(), frozenset({"/file"})}
    ops.fsync_directory("/")
    assert states(ops) == {frozenset()}


def test_a_name_that_is_certain_leads_to_bytes_that_need_not_be() -> None:
    """The classic: a rename that is there before the data of what it renamed."""
    ops = CrashFileOps()
    ops.close(certain_file(ops, "/file", b"old"))
    ops.close(file_with(ops, "/new", b"new"))
    ops.replace("/new", "/file")
    ops.fsync_directory("/")
    assert states(ops, "/file") == {b"", b"\0\0\0", b"new"}


def test_a_rename_is_there_whole_or_not_at_all() -> None:
    ops = CrashFileOps()
    for name, data in (("/a", b"1"), ("/b", b"2")):
        ops.close(certain_file(ops, name, data))
    ops.replace("/a", "/b")
    found = [state.contents() for state in ops.all_states(ops.operation_count)]
    assert sorted(found, key=len) == [{"/b": b"1"}, {"/a": b"1", "/b": b"2"}]


def test_operations_on_names_are_there_in_any_combination() -> None:
    ops = CrashFileOps()
    for name in ("/a", "/b"):
        ops.close(certain_file(ops, name))
    ops.link("/a", "/c")
    ops.unlink("/b")
    ops.rename_without_replacing("/a", "/d")
    combinations = itertools.product(({"/c"}, set()), ({"/b"}, set()), ({"/a"}, {"/d"}))
    assert states(ops) == {frozenset(set().union(*each)) for each in combinations}


def test_what_stands_in_a_directory_without_a_name_is_gone() -> None:
    ops = CrashFileOps()
    ops.make_directory("/outer")
    ops.make_directory("/outer/inner")
    ops.close(certain_file(ops, "/outer/inner/file", b"abc"))
    ops.fsync_directory("/outer")
    ops.fsync_directory("/outer/inner")
    assert [everything_in(state) for state in ops.all_states(ops.operation_count)] == [
        [("/", None), ("/outer", None), ("/outer/inner", None), ("/outer/inner/file", b"abc")],
        [("/", None)],
    ]
    ops.fsync_directory("/")
    assert states(ops) == {frozenset({"/outer/inner/file"})}


def test_a_rename_from_one_directory_to_another_needs_both() -> None:
    ops = CrashFileOps()
    for directory in ("/from", "/to"):
        ops.make_directory(directory)
    ops.fsync_directory("/")
    ops.close(certain_file(ops, "/from/file"))
    ops.replace("/from/file", "/to/file")
    both = {frozenset({"/from/file"}), frozenset({"/to/file"})}
    assert states(ops) == both
    ops.fsync_directory("/to")
    assert states(ops) == both
    ops.close(certain_file(ops, "/to/later"))
    assert states(ops) == {each | {"/to/later"} for each in both}
    ops.fsync_directory("/from")
    assert states(ops) == {frozenset({"/to/file", "/to/later"})}


def test_a_directory_keeps_what_is_in_it_under_another_name() -> None:
    ops = CrashFileOps()
    ops.make_directory("/old")
    ops.fsync_directory("/")
    ops.close(certain_file(ops, "/old/file"))
    ops.rename_without_replacing("/old", "/new")
    assert states(ops) == {frozenset({"/old/file"}), frozenset({"/new/file"})}
    ops.fsync_directory("/")
    assert states(ops) == {frozenset({"/new/file"})}


def test_two_names_of_one_file_lead_to_the_same_bytes() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/a", b"old")
    ops.link("/a", "/b")
    ops.fsync_directory("/")
    ops.pwrite(descriptor, memoryview(b"new"), 0)
    found = [state.contents() for state in ops.all_states(ops.operation_count)]
    assert found == [{"/a": b"old", "/b": b"old"}, {"/a": b"new", "/b": b"new"}]
    two_files = CrashFileOps()
    for name in ("/a", "/b"):
        two_files.close(file_with(two_files, name, b"new"))
    assert two_files.contents() == ops.contents()
    assert two_files.digest() != ops.digest()
    ops.close(descriptor)


def test_after_the_cut_nobody_has_anything_open_or_locked() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"abc")
    assert ops.lock(descriptor)
    [state] = ops.all_states(ops.operation_count)
    with pytest.raises(OSError, match="Bad file descriptor"):
        state.fsync(descriptor)
    again = state.open_write("/file")
    assert state.lock(again)
    # And the power may be cut again.
    state.pwrite(again, memoryview(b"xyz"), 0)
    assert states(state, "/file") == {b"abc", b"xyz"}
    assert ops.contents() == {"/file": b"abc"}
    state.close(again)
    ops.close(descriptor)


def test_killed_processes_leave_files_but_neither_descriptors_nor_locks() -> None:
    ops = CrashFileOps()
    descriptor = file_with(ops, "/file", b"abc")
    assert ops.lock(descriptor)
    before = ops.operation_count
    ops.end_processes()
    assert ops.operation_count == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        ops.close(descriptor)
    again = ops.open_write("/file")
    assert ops.lock(again)
    ops.close(again)
    assert ops.contents() == {"/file": b"abc"}
    # What they had not made certain is as uncertain as ever.
    assert states(ops) == {frozenset(), frozenset({"/file"})}


def test_of_coarse_files_only_the_two_extremes_are_tried() -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/log", b"1")
    for offset in range(1, 6):
        ops.pwrite(descriptor, memoryview(b"x"), offset)
    ops.close(descriptor)
    now = ops.operation_count
    assert ops.count_states(now) > 60
    found = {state.contents()["/log"] for state in ops.all_states(now, coarse=lambda path: path == "/log")}
    assert found == {b"1", b"1xxxxx"}
    assert ops.count_states(now, coarse=lambda path: path == "/log") == 2


def test_the_record_tells_what_was_done_and_noted_and_where_cutting_is_worth_it() -> None:
    ops = CrashFileOps()
    descriptor = ops.open_exclusive("/file")
    with pytest.raises(FileExistsError):
        ops.open_exclusive("/file")
    ops.status("/file")
    ops.note("opened", 1)
    ops.close(descriptor)
    ops.fsync_directory("/")
    names = ["open_exclusive", "open_exclusive", "status", "note", "close", "fsync_directory"]
    assert [operation.name for operation in ops.record] == names
    assert [operation.failed_with for operation in ops.record][:2] == [None, errno.EEXIST]
    assert ops.prefixes() == [0, 1, 4, 6]
    assert ops.notes(3) == []
    assert ops.notes(4) == ops.notes() == [("opened", 1)]
    for prefix in (-1, 7):
        with pytest.raises(ValueError, match="6 operations"):
            ops.random_state(prefix, random.Random(1))


# Random states


def changed_at_random(ops: CrashFileOps, rng: random.Random, count: int, *, fails: bool = True) -> None:
    """Some files that are written, cut, synced and renamed; some calls fail."""
    names = ["/a", "/b", "/d/a", "/d/b"]
    ops.make_directory("/d")
    descriptors = [ops.open_exclusive(name) for name in names[:2]]
    for _ in range(count):
        name, other, descriptor = rng.choice(names), rng.choice(names), rng.choice(descriptors)
        calls: list[Callable[[], Any]] = [
            lambda: ops.pwrite(descriptor, memoryview(rng.randbytes(3)), rng.randrange(PAGE + 5)),  # noqa: B023
            lambda: ops.truncate(descriptor, rng.randrange(9)),  # noqa: B023
            lambda: ops.fsync(descriptor),  # noqa: B023
            lambda: ops.fsync_directory(rng.choice(["/", "/d"])),
            lambda: ops.replace(name, other),  # noqa: B023
            lambda: ops.link(name, other),  # noqa: B023
            lambda: ops.unlink(name),  # noqa: B023
            lambda: descriptors.append(ops.open_exclusive(name)),  # noqa: B023
            *([ops.fail_fsync] if fails else []),
        ]
        try:
            rng.choice(calls)()
        except OSError:
            continue
    for descriptor in descriptors:
        ops.close(descriptor)


def test_random_states_are_among_all_states_and_so_is_that_after_a_kill(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    tried = 0
    for _ in range(20):
        ops = CrashFileOps()
        changed_at_random(ops, rng, 12)
        for prefix in ops.prefixes():
            if ops.count_states(prefix) > 200:
                continue
            known = {state.digest() for state in ops.all_states(prefix)}
            assert ops.state_after_kill(prefix).digest() in known
            for _ in range(4):
                assert ops.random_state(prefix, rng).digest() in known
            tried += 1
        assert ops.state_after_kill(ops.operation_count).digest() == ops.digest()
    assert tried > 50


def test_once_everything_is_synced_there_is_one_state(rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    for _ in range(20):
        ops = CrashFileOps()
        changed_at_random(ops, rng, 10, fails=False)
        for path in ops.contents():
            descriptor = ops.open_read(path)
            ops.fsync(descriptor)
            ops.close(descriptor)
        for directory in ("/d", "/"):
            ops.fsync_directory(directory)
        [state] = ops.all_states(ops.operation_count)
        assert state.digest() == ops.digest()


def test_every_state_of_a_small_case_is_drawn_sooner_or_later(rng_seed: int) -> None:
    ops = CrashFileOps()
    descriptor = certain_file(ops, "/file", b"a" * (2 * PAGE))
    ops.pwrite(descriptor, memoryview(b"b" * (2 * PAGE)), 0)
    ops.link("/file", "/link")
    ops.close(descriptor)
    now, rng = ops.operation_count, random.Random(rng_seed)
    wanted = {state.digest() for state in ops.all_states(now)}
    assert len(wanted) == 8
    assert {ops.random_state(now, rng).digest() for _ in range(2000)} == wanted


def test_the_same_seed_draws_the_same_state_whatever_the_bytes(rng_seed: int) -> None:
    def lost(marks: bytes) -> list[list[str]]:
        """What is left of a program that writes other bytes every time it runs."""
        ops = CrashFileOps()
        log = certain_file(ops, "/log")
        for number in range(20):
            ops.close(file_with(ops, f"/file-{number}", marks))
            ops.pwrite(log, memoryview(marks * (number + 1)), 0)
            ops.status("/log")
        ops.close(log)
        found = [ops.random_state(prefix, random.Random(rng_seed)).contents() for prefix in ops.prefixes()]
        return [sorted(path for path, data in each.items() if data or path == "/log") for each in found]

    assert lost(b"x") == lost(b"other")


def test_it_is_light_to_import() -> None:
    code = "import sys, lastgood.testing; print(sorted({'torch', 'pytest'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
