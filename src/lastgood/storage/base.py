"""What a storage backend is: the whole contract between checkpoints and the places they are kept in.

A path is a string that the backend understands; for local storage it is a path of the file system. Every error of
the backend is raised as one of :mod:`lastgood.errors`, with the original chained.
"""

from typing import Protocol

Buffer = bytes | bytearray | memoryview


class StreamedWrite(Protocol):
    """A file on its way to storage. Nobody sees it under its name before :meth:`commit`.

    Exactly one of :meth:`commit` and :meth:`abort` ends it; ``abort`` may follow a failed ``commit``.
    """

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``. Threads may call this at the same time for disjoint ranges.

        Local storage can skip the page cache when the data's address, ``offset`` and length are multiples of
        4096 bytes; anything else is written all the same.
        """

    def make_durable(self) -> None:
        """Return once every byte written would survive a power cut. No ``write_at`` may follow.

        When this raises, the data is in an unknown state: only ``abort`` may follow, never a second attempt.
        """

    def commit(self, *, replace: bool = True) -> None:
        """Publish the file under its name, atomically and durably; makes it durable first if that is still to do.

        With ``replace=False`` an existing file of that name is left alone and
        :class:`~lastgood.errors.CheckpointExistsError` is raised.
        """

    def abort(self) -> None:
        """Drop what was written. May be called several times, and after a failure; never raises.

        Also while a ``write_at`` that was given up for being slow is still at work: that changes nothing any more that
        could be published, and may fail.
        """


class StoredFile(Protocol):
    """A file open for reading. The bytes are those of the moment it was opened, whatever is published later."""

    path: str
    size: int

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on. Threads may call this at the same time.

        Raises :class:`~lastgood.errors.CorruptCheckpointError` when the file ends before ``target`` is full.
        """

    def expect_other_readers(self) -> None:
        """Several processes of this machine are about to read the same bytes: let the device be asked once for all.

        A hint, for local storage to read through the page cache from now on.
        """

    def close(self) -> None:
        """Give the file back. May be called several times."""


class StorageLock(Protocol):
    """The right to write one file, until it is released or its holder's process has died."""

    def release(self) -> None:
        """Let others have it. May be called several times; never raises."""


class StorageBackend(Protocol):
    """A place for checkpoints. All methods may be called from several threads."""

    def begin(self, path: str, size: int) -> StreamedWrite:
        """Start a file of exactly ``size`` bytes, making missing parent directories (durably) on the way.

        Clears temporaries that dead writers of the same name left behind. Raises
        :class:`~lastgood.errors.StorageError` before a byte is written when ``size`` bytes are not available.
        """

    def try_lock(self, path: str, *, shared: bool = False) -> StorageLock | None:
        """The right to write the file ``path``; ``None`` if another writer has it. Does not wait.

        With ``shared``, one that any number of others may hold at the same time, if they have asked for it in the same
        way: it keeps out those who want it for themselves alone. Makes missing parent directories, as :meth:`begin`
        does. It keeps apart those who ask for it, not those who do not. A backend that has no locks gives one that
        keeps nobody apart.
        """

    def put(self, path: str, data: Buffer) -> None:
        """Write a small file whole: durable and visible when this returns, replacing one of the same name."""

    def put_if_absent(self, path: str, data: Buffer) -> None:
        """Like :meth:`put`, but raises :class:`~lastgood.errors.CheckpointExistsError` if the name is taken."""

    def append(self, path: str, data: Buffer) -> None:
        """Add to the end of a file, which is made if it is not there, with missing parent directories.

        For logs: nothing is durable when this returns, and a crash may leave the last bytes out or torn. Appends of
        several writers do not overwrite each other.
        """

    def open(self, path: str) -> StoredFile:
        """Open for reading; raises :class:`~lastgood.errors.CheckpointNotFoundError` if there is no such file."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or directory of this name."""

    def list(self, path: str) -> list[str]:
        """The names directly under a directory, sorted; an empty list if there is no such directory."""

    def delete(self, path: str) -> None:
        """Remove a file durably. A file that is not there is no error."""

    def rename(self, path: str, new_path: str) -> None:
        """Give a directory, with all that is in it, another name in the same parent: atomically and durably.

        Raises :class:`~lastgood.errors.CheckpointExistsError` if that name is taken,
        :class:`~lastgood.errors.CheckpointNotFoundError` if there is no such directory.
        """

    def settle(self, path: str) -> None:
        """Make the names directly in a directory survive a power cut, whoever has put them there.

        A directory that is not there is no error.
        """

    def has_writers(self, path: str) -> bool:
        """Whether somebody alive writes in this directory: has a file that is not published yet, or holds a lock.

        False where that cannot be told.
        """

    def delete_directory(self, path: str) -> bool:
        """Remove a directory durably if nothing is in it but what dead writers have left; returns whether it is gone.

        What living writers or others keep there stays, and so does the directory then.
        """
