"""A file system in memory whose power can be cut, after any operation and in every way that leaves a trace.

::

    ops = CrashFileOps()
    my_backend(ops).put("/run/file", b"data")
    ops.note("durable", "/run/file")
    for prefix in ops.prefixes():
        for state in ops.all_states(prefix):
            ...  # a new process begins on what is left: does it find what the notes of that prefix promise?

What is assumed of disk and file system is as little as can be lived with, and less than most of them give:

- Bytes of a file are there for certain only once that file has been fsynced. Until then each write is there or not,
  page by page of 4096 bytes, independently of everything else and in any order; what is not there is what was there
  before, or zeros. A file has any of the lengths that it has had since its last fsync.
- Names are there for certain only once the directory that they stand in has been fsynced (one operation on names in
  two directories: both). Until then each operation on names is there or not, independently of everything else, but
  whole: a rename is never half done. Fsyncing a file does not keep its name, nor fsyncing a directory its own name in
  the directory above. What stands in a directory that has no name is gone with it.
- An fsync of a file that fails loses what it should have kept, and tells so once: the next one of the same file
  succeeds, and makes none of that certain.
- Nothing that was certain is ever lost, and one page is never half written.

After the cut there is a new machine: no descriptor is open, no lock is held. While the machine runs, it behaves as
Linux does: a file without a name lives as long as a descriptor of it is open, and locks are those of ``flock``.
"""

import random
from collections.abc import Iterator
from typing import Any

from lastgood.testing._crash_disk import ROOT, Disk, Image, IsCoarse
from lastgood.testing._crash_operations import Operation, RecordedFiles

_EMPTY = Image({ROOT: {}}, {})


class CrashFileOps(RecordedFiles):
    """:class:`~lastgood.storage.file_ops.FileOps` in memory, with a record of all that was done.

    A *prefix* is a number of operations of that record: after so many the power is cut. ``capacity`` is the number of
    bytes that there is room for (``None``: no limit), and may be changed at any time. Without ``has_direct_io``,
    :meth:`open_direct` is refused. May be used by several threads.
    """

    def __init__(self, *, capacity: int | None = None, has_direct_io: bool = True, _image: Image = _EMPTY) -> None:
        super().__init__(_image, capacity, has_direct_io=has_direct_io)
        self._image = _image
        self._disk = Disk(_image)
        self._replayed = 0

    # What is there, and what was done

    @property
    def capacity(self) -> int | None:
        """How many bytes there is room for."""
        return self._tree.capacity

    @capacity.setter
    def capacity(self, capacity: int | None) -> None:
        self._tree.capacity = capacity

    @property
    def record(self) -> tuple[Operation, ...]:
        """All operations so far, with notes among them, in the order in which they took effect."""
        with self._lock:
            return tuple(self._record)

    @property
    def operation_count(self) -> int:
        """How many there are in the record: the longest prefix."""
        return len(self._record)

    def note(self, *words: Any) -> None:
        """Put a note into the record: what has been acknowledged by now, say, or is about to be begun."""
        with self._lock:
            self._record.append(Operation("note", " ".join(map(str, words)), (), None, words))

    def notes(self, prefix: int | None = None) -> list[tuple[Any, ...]]:
        """The notes among the first ``prefix`` operations, or all."""
        with self._lock:
            return [operation.note for operation in self._record[:prefix] if operation.note is not None]

    def prefixes(self) -> list[int]:
        """Those after which there is something new: 0, and one for each operation that changed the disk, and note.

        The n-th of them is the same moment in every run of the same program; the numbers themselves also count what
        only looked.
        """
        with self._lock:
            numbers = enumerate(self._record, 1)
            return [0, *(number for number, done in numbers if done.changes or done.note is not None)]

    def contents(self) -> dict[str, bytes]:
        """Every file by its path, with its bytes as they are now."""
        with self._lock:
            image = self._tree.image()
        return {path: image.files[number] for path, number in sorted(image.tree().items()) if number in image.files}

    def digest(self) -> str:
        """Equal for two file systems in which the same files and directories have the same paths."""
        with self._lock:
            return self._tree.image().digest()

    def fail_fsync(self, after: int = 0) -> None:
        """Let one fsync of a file fail with ``EIO``: the next one, or the one after so many that succeed."""
        self._fsyncs_to_failure = after

    def end_processes(self) -> None:
        """Close every descriptor and free every lock, as when whoever used them is killed; nothing else happens.

        A kill by itself loses nothing, but what it leaves may be lost to a power cut later.
        """
        with self._lock:
            for descriptor in list(self._open):
                self._release(descriptor)

    # Power cuts

    def all_states(self, prefix: int, *, coarse: IsCoarse | None = None) -> Iterator["CrashFileOps"]:
        """Every different state in which a power cut after so many operations could leave the disk.

        Their number doubles with every write or name that is not certain. Of files for whose paths ``coarse`` returns
        true (a log, say, that is never fsynced), only two are tried: all that is not certain is there, or none of it.
        """
        with self._lock:
            different = {image.digest(): image for image in self._disk_at(prefix).images(coarse or _never)}
        return map(self._after_cut, different.values())

    def count_states(self, prefix: int, *, coarse: IsCoarse | None = None) -> int:
        """How many :meth:`all_states` would look at; it gives each different one once."""
        with self._lock:
            return self._disk_at(prefix).count(coarse or _never)

    def random_state(self, prefix: int, rng: random.Random) -> "CrashFileOps":
        """One of these states, drawn by ``rng``: from mostly lost to mostly kept, and anything between.

        The same seed gives the same state of the same prefix, also when the program is run again and other bytes are
        written by the same operations.
        """
        with self._lock:
            return self._after_cut(self._disk_at(prefix).drawn(rng))

    def state_after_kill(self, prefix: int) -> "CrashFileOps":
        """What a new process finds when the old one was killed after so many operations, and the machine goes on."""
        with self._lock:
            return self._after_cut(self._disk_at(prefix).everything())

    def _disk_at(self, prefix: int) -> Disk:
        if not 0 <= prefix <= len(self._record):
            raise ValueError(f"there are {len(self._record)} operations in the record, not {prefix}")
        if prefix < self._replayed:
            self._disk, self._replayed = Disk(self._image), 0
        for operation in self._record[self._replayed : prefix]:
            for change in operation.changes:
                self._disk.apply(change)
        self._replayed = prefix
        return self._disk

    def _after_cut(self, image: Image) -> "CrashFileOps":
        return CrashFileOps(capacity=self.capacity, has_direct_io=self._has_direct_io, _image=image)


def _never(path: str) -> bool:
    return False
