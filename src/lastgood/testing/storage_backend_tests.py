"""The contract of :class:`~lastgood.storage.base.StorageBackend` as tests, to be inherited.

::

    class TestMyStorage(StorageBackendTests):
        def make_backend(self, tmp_path):
            return MyStorage(...), "some/prefix/of/its/own"
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from lastgood.errors import CheckpointExistsError, CheckpointNotFoundError, CorruptCheckpointError
from lastgood.storage.base import StorageBackend

_OLD = b"what was there before"


def read_all(storage: StorageBackend, path: str) -> bytes:
    """All bytes of a stored file, by one read."""
    with closing(storage.open(path)) as stored:
        target = bytearray(stored.size)
        stored.read_into(0, memoryview(target))
    return bytes(target)


def random_bytes(size: int) -> bytes:
    """Bytes of no pattern; the seed is printed, and so shown when the test fails."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"{size} random bytes: seed {seed}")
    return random.Random(seed).randbytes(size)


@contextmanager
def running(*jobs: Callable[[], None]) -> Iterator[None]:
    """Run each job in a thread of its own beside the block; afterwards wait for all and raise the first failure."""
    failures: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class StorageBackendTests:
    """Inherit, name the class ``Test...`` and override :meth:`make_backend`; every test gets a new backend."""

    has_locks = True
    """Set it to ``False`` for a backend whose locks keep nobody apart."""

    def make_backend(self, tmp_path: Path) -> tuple[StorageBackend, str]:
        """A backend, and the path of a place in it that is empty, or not there yet, and used by nobody else."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _set_up(self, tmp_path: Path) -> None:
        self.storage, self.root = self.make_backend(tmp_path)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def test_put_gives_back_the_same_bytes(self) -> None:
        data = random_bytes(100_003)
        for name, kind in (("a", bytes(data)), ("b", bytearray(data)), ("c", memoryview(data))):
            self.storage.put(self.path(name), kind)
            assert read_all(self.storage, self.path(name)) == data

    def test_put_makes_the_directories_on_the_way(self) -> None:
        self.storage.put(self.path("run/step-1/file"), b"deep")
        assert read_all(self.storage, self.path("run/step-1/file")) == b"deep"
        assert self.storage.list(self.path("run/step-1")) == ["file"]

    def test_put_replaces_and_a_file_opened_before_keeps_its_bytes(self) -> None:
        self.storage.put(self.path("file"), _OLD)
        with closing(self.storage.open(self.path("file"))) as opened_before:
            self.storage.put(self.path("file"), b"new")
            target = bytearray(len(_OLD))
            opened_before.read_into(0, memoryview(target))
            assert target == _OLD
        assert read_all(self.storage, self.path("file")) == b"new"

    def test_an_empty_file_is_a_file(self) -> None:
        self.storage.put(self.path("empty"), b"")
        assert self.storage.exists(self.path("empty"))
        assert read_all(self.storage, self.path("empty")) == b""

    def test_put_if_absent_leaves_what_is_there(self) -> None:
        self.storage.put_if_absent(self.path("file"), _OLD)
        with pytest.raises(CheckpointExistsError) as caught:
            self.storage.put_if_absent(self.path("file"), b"new")
        assert self.path("file") in str(caught.value)
        assert read_all(self.storage, self.path("file")) == _OLD
        assert self.storage.list(self.root) == ["file"]

    def test_of_many_put_if_absent_at_once_exactly_one_wins(self) -> None:
        start = threading.Barrier(8)
        winners: list[bytes] = []

        def contend(data: bytes) -> None:
            start.wait()
            try:
                self.storage.put_if_absent(self.path("file"), data)
            except CheckpointExistsError:
                return
            winners.append(data)

        with running(*(partial(contend, b"writer %d" % number) for number in range(8))):
            pass
        assert len(winners) == 1
        assert read_all(self.storage, self.path("file")) == winners[0]

    def test_of_many_puts_at_once_one_whole_file_stays(self) -> None:
        contents = [bytes([number]) * 50_000 for number in range(6)]

        def put(data: bytes) -> None:
            for _ in range(3):
                self.storage.put(self.path("file"), data)

        with running(*(partial(put, data) for data in contents)):
            pass
        assert read_all(self.storage, self.path("file")) in contents
        assert self.storage.list(self.root) == ["file"]

    def test_a_streamed_file_is_seen_by_nobody_before_its_commit(self) -> None:
        write = self.storage.begin(self.path("file"), 6)
        write.write_at(0, memoryview(b"abcdef"))
        assert not self.storage.exists(self.path("file"))
        assert self.storage.list(self.root) == []
        write.make_durable()
        assert not self.storage.exists(self.path("file"))
        write.commit()
        assert read_all(self.storage, self.path("file")) == b"abcdef"
        assert self.storage.list(self.root) == ["file"]

    def test_threads_write_disjoint_ranges_in_any_order(self) -> None:
        data = random_bytes((5 << 20) + 4321)
        view = memoryview(data)
        seed = random.SystemRandom().getrandbits(32)
        print(f"ranges: seed {seed}")
        rng = random.Random(seed)
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(20)), 1 << 20, 3 << 20})
        ranges = list(pairwise(cuts))
        rng.shuffle(ranges)
        write = self.storage.begin(self.path("file"), len(data))

        def write_every_fourth(first: int) -> None:
            for start, end in ranges[first::4]:
                write.write_at(start, view[start:end])

        with running(*(partial(write_every_fourth, first) for first in range(4))):
            pass
        write.commit()
        assert read_all(self.storage, self.path("file")) == data

    def test_a_range_may_be_written_again(self) -> None:
        data = bytearray(random_bytes(1 << 20))
        write = self.storage.begin(self.path("file"), len(data))
        write.write_at(0, memoryview(bytes(data)))
        data[10:20] = b"a new head"
        write.write_at(10, memoryview(data)[10:20])
        write.commit()
        assert read_all(self.storage, self.path("file")) == data

    def test_commit_without_replacing_leaves_what_is_there(self) -> None:
        self.storage.put(self.path("file"), _OLD)
        write = self.storage.begin(self.path("file"), 3)
        write.write_at(0, memoryview(b"new"))
        with pytest.raises(CheckpointExistsError):
            write.commit(replace=False)
        write.abort()
        assert read_all(self.storage, self.path("file")) == _OLD
        assert self.storage.list(self.root) == ["file"]

    def test_commit_without_replacing_publishes_where_nothing_is(self) -> None:
        write = self.storage.begin(self.path("file"), 3)
        write.write_at(0, memoryview(b"new"))
        write.commit(replace=False)
        assert read_all(self.storage, self.path("file")) == b"new"

    def test_abort_leaves_nothing_but_what_was_there(self) -> None:
        self.storage.put(self.path("file"), _OLD)
        write = self.storage.begin(self.path("file"), 3)
        write.write_at(0, memoryview(b"new"))
        write.abort()
        write.abort()
        assert read_all(self.storage, self.path("file")) == _OLD
        assert self.storage.list(self.root) == ["file"]

    def test_abort_after_commit_changes_nothing(self) -> None:
        write = self.storage.begin(self.path("file"), 3)
        write.write_at(0, memoryview(b"new"))
        write.commit()
        write.abort()
        assert read_all(self.storage, self.path("file")) == b"new"

    def test_threads_read_any_ranges(self) -> None:
        data = random_bytes((3 << 20) + 777)
        self.storage.put(self.path("file"), data)
        with closing(self.storage.open(self.path("file"))) as stored:
            assert (stored.path, stored.size) == (self.path("file"), len(data))

            def read_some(seed: int) -> None:
                rng = random.Random(seed)
                for _ in range(10):
                    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
                    target = bytearray(end - start)
                    stored.read_into(start, memoryview(target))
                    assert target == data[start:end], (seed, start, end)

            with running(*(partial(read_some, seed) for seed in range(4))):
                pass

    def test_reading_nothing_at_the_end_is_no_error(self) -> None:
        self.storage.put(self.path("file"), b"12345")
        with closing(self.storage.open(self.path("file"))) as stored:
            stored.read_into(5, memoryview(bytearray(0)))

    def test_reading_past_the_end_is_corruption(self) -> None:
        self.storage.put(self.path("file"), b"12345")
        with closing(self.storage.open(self.path("file"))) as stored:
            for offset in (1, 5, 1 << 40):
                with pytest.raises(CorruptCheckpointError) as caught:
                    stored.read_into(offset, memoryview(bytearray(5)))
                assert caught.value.path == self.path("file")

    def test_a_stored_file_may_be_closed_twice(self) -> None:
        self.storage.put(self.path("file"), b"12345")
        stored = self.storage.open(self.path("file"))
        stored.close()
        stored.close()

    def test_opening_what_is_not_there(self) -> None:
        with pytest.raises(CheckpointNotFoundError) as caught:
            self.storage.open(self.path("missing"))
        assert self.path("missing") in str(caught.value)
        assert caught.value.path == self.path("missing")

    def test_a_lock_keeps_others_out_until_it_is_released(self) -> None:
        lock = self.storage.try_lock(self.path("directory/that/is/new/file"))
        assert lock is not None
        again = self.storage.try_lock(self.path("directory/that/is/new/file"))
        assert (again is None) == self.has_locks
        lock.release()
        for _ in range(3):
            lock = self.storage.try_lock(self.path("directory/that/is/new/file"))
            assert lock is not None
            lock.release()

    def test_a_lock_may_be_released_twice_and_is_that_of_its_next_holder_then(self) -> None:
        first = self.storage.try_lock(self.path("file"))
        assert first is not None
        first.release()
        second = self.storage.try_lock(self.path("file"))
        assert second is not None
        first.release()
        assert (self.storage.try_lock(self.path("file")) is None) == self.has_locks
        second.release()

    def test_a_shared_lock_is_shared_by_those_who_ask_for_it_so_and_by_nobody_else(self) -> None:
        path = self.path("directory/that/is/new/file")
        first = self.storage.try_lock(path, shared=True)
        second = self.storage.try_lock(path, shared=True)
        assert first is not None
        assert second is not None
        for lock in (first, second):
            assert (self.storage.try_lock(path) is None) == self.has_locks
            lock.release()
        assert self.storage.list(self.path("directory/that/is/new")) == []
        alone = self.storage.try_lock(path)
        assert alone is not None
        assert (self.storage.try_lock(path, shared=True) is None) == self.has_locks
        alone.release()
        again = self.storage.try_lock(path, shared=True)
        assert again is not None
        again.release()
        again.release()

    def test_a_lock_is_of_one_file_and_no_file_itself(self) -> None:
        self.storage.put(self.path("file"), _OLD)
        locks = [self.storage.try_lock(self.path(name)) for name in ("file", "other")]
        assert None not in locks
        assert self.storage.list(self.root) == ["file"]
        assert not self.storage.exists(self.path("other"))
        assert read_all(self.storage, self.path("file")) == _OLD
        self.storage.put(self.path("file"), b"new")
        for lock in locks:
            assert lock is not None
            lock.release()
        assert self.storage.list(self.root) == ["file"]
        assert read_all(self.storage, self.path("file")) == b"new"

    def test_of_many_who_ask_for_a_lock_exactly_one_at_a_time_has_it(self) -> None:
        if not self.has_locks:
            pytest.skip("this backend has no locks")
        inside: list[int] = []
        most: list[int] = []

        def work(number: int) -> None:
            had = 0
            while had < 20:
                lock = self.storage.try_lock(self.path("file"))
                if lock is None:
                    continue
                inside.append(number)
                most.append(len(inside))
                had += 1
                inside.remove(number)
                lock.release()

        with running(*(partial(work, number) for number in range(4))):
            pass
        assert len(most) == 80
        assert max(most) == 1
        assert self.storage.list(self.root) == []

    def test_exists(self) -> None:
        assert not self.storage.exists(self.path("directory"))
        self.storage.put(self.path("directory/file"), b"1")
        assert self.storage.exists(self.path("directory"))
        assert self.storage.exists(self.path("directory/file"))
        assert not self.storage.exists(self.path("directory/other"))
        assert not self.storage.exists(self.path("directory/file/below"))

    def test_list_is_sorted_and_not_deep(self) -> None:
        for name in ("b", "a", "c/deeper", ".hidden"):
            self.storage.put(self.path(name), b"1")
        assert self.storage.list(self.root) == [".hidden", "a", "b", "c"]
        assert self.storage.list(self.path("no such directory")) == []

    def test_appends_go_to_the_end_of_a_file_that_is_made_with_its_directories(self) -> None:
        path = self.path("new/deep/log")
        for line in (b"first\n", b"", memoryview(b"second\n")):
            self.storage.append(path, line)
        assert read_all(self.storage, path) == b"first\nsecond\n"

    def test_appends_at_once_overwrite_nothing(self) -> None:
        path = self.path("log")

        def write(number: int) -> None:
            for _ in range(20):
                self.storage.append(path, b"%d\n" % number * 3)

        with running(*[lambda number=number: write(number) for number in range(4)]):
            pass
        lines = read_all(self.storage, path).split()
        assert sorted(lines) == sorted(b"%d" % number for number in range(4) for _ in range(60))

    def test_rename_moves_a_directory_with_all_that_is_in_it(self) -> None:
        self.storage.put(self.path("old/inner/file"), b"kept")
        self.storage.rename(self.path("old"), self.path("new"))
        assert not self.storage.exists(self.path("old"))
        assert read_all(self.storage, self.path("new/inner/file")) == b"kept"

    def test_rename_takes_no_name_that_is_taken(self) -> None:
        for name in ("old/file", "new/file", "plain"):
            self.storage.put(self.path(name), name.encode())
        for taken in ("new", "plain"):
            with pytest.raises(CheckpointExistsError):
                self.storage.rename(self.path("old"), self.path(taken))
        assert read_all(self.storage, self.path("old/file")) == b"old/file"
        assert read_all(self.storage, self.path("new/file")) == b"new/file"
        with pytest.raises(CheckpointNotFoundError):
            self.storage.rename(self.path("nothing"), self.path("other"))
        with pytest.raises(CheckpointNotFoundError):
            self.storage.rename(self.path("plain"), self.path("other"))

    def test_only_a_directory_that_nothing_is_left_in_is_deleted(self) -> None:
        self.storage.put(self.path("directory/file"), b"still needed")
        assert not self.storage.delete_directory(self.path("directory"))
        assert read_all(self.storage, self.path("directory/file")) == b"still needed"
        self.storage.delete(self.path("directory/file"))
        assert self.storage.delete_directory(self.path("directory"))
        assert not self.storage.exists(self.path("directory"))
        assert self.storage.delete_directory(self.path("directory"))

    def test_a_directory_in_which_somebody_writes_or_holds_a_lock_stays(self) -> None:
        write = self.storage.begin(self.path("directory/file"), 3)
        assert not self.storage.delete_directory(self.path("directory"))
        write.write_at(0, memoryview(b"abc"))
        write.commit()
        assert read_all(self.storage, self.path("directory/file")) == b"abc"
        self.storage.delete(self.path("directory/file"))
        lock = self.storage.try_lock(self.path("directory/file"))
        assert lock is not None
        assert not self.storage.delete_directory(self.path("directory"))
        lock.release()
        assert self.storage.delete_directory(self.path("directory"))

    def test_whoever_writes_or_holds_a_lock_in_a_directory_is_seen_until_that_is_over(self) -> None:
        directory = self.path("directory")
        assert not self.storage.has_writers(directory)
        write = self.storage.begin(self.path("directory/file"), 3)
        assert self.storage.has_writers(directory)
        write.abort()
        lock = self.storage.try_lock(self.path("directory/file"))
        assert lock is not None
        assert self.storage.has_writers(directory)
        lock.release()
        assert not self.storage.has_writers(directory)

    def test_delete(self) -> None:
        self.storage.put(self.path("file"), b"1")
        self.storage.put(self.path("other"), b"2")
        self.storage.delete(self.path("file"))
        assert self.storage.list(self.root) == ["other"]
        with pytest.raises(CheckpointNotFoundError):
            self.storage.open(self.path("file"))
        self.storage.delete(self.path("file"))
        self.storage.delete(self.path("no such directory/file"))

    def test_settling_changes_nothing_that_can_be_seen(self) -> None:
        self.storage.put(self.path("run/file"), b"data")
        for directory in ("run", "nothing/there"):
            self.storage.settle(self.path(directory))
        assert self.storage.list(self.path("run")) == ["file"]
        assert not self.storage.exists(self.path("nothing"))
