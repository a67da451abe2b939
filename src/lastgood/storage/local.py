"""Checkpoints in directories of the machine's own file systems."""

import contextlib
import os

from lastgood.errors import ConfigError
from lastgood.storage._directories import is_written_in, remove_if_empty, rename_directory
from lastgood.storage._durable_write import (
    DurableWrite,
    begin_durable_write,
    existing_part,
    is_temporary,
    make_directories,
    refuse_directory,
    sync_directory,
)
from lastgood.storage._file_lock import FileLock, is_lock, try_file_lock
from lastgood.storage._local_errors import UNCHANGED, name_taken, not_found, translated, wrote_nothing
from lastgood.storage._local_read import LocalFile, open_local_file
from lastgood.storage.base import Buffer
from lastgood.storage.file_ops import FileOps, OsFileOps

_ATTEMPTS = 16


class LocalStorage:
    """The :class:`~lastgood.storage.base.StorageBackend` of local (and mounted network) file systems.

    A relative path is taken from the working directory at the time of the call. A symbolic link under a file's name
    is replaced by the file, not followed. Everything that is written is written in full under a temporary name in
    the same directory first, so a directory needs room for the old file and the new one at once. ``list`` does not
    show these temporaries, nor locks.
    """

    def __init__(self, file_ops: FileOps | None = None) -> None:
        self._ops: FileOps = OsFileOps() if file_ops is None else file_ops

    def begin(self, path: str, size: int) -> DurableWrite:
        if size < 0:
            raise ConfigError(f"a file cannot have {size} bytes", path=path)
        return begin_durable_write(self._ops, _absolute(path), size)

    def try_lock(self, path: str, *, shared: bool = False) -> FileLock | None:
        absolute = _absolute(path)
        directory = os.path.dirname(absolute)
        with translated("locking", path, phase="lock"):
            for _ in range(_ATTEMPTS):
                existing, missing = existing_part(self._ops, directory, absolute)
                if missing:
                    make_directories(self._ops, existing, missing)
                with contextlib.suppress(FileNotFoundError):  # somebody has just removed the empty directory
                    return try_file_lock(self._ops, absolute, shared=shared)
            return None

    def put(self, path: str, data: Buffer) -> None:
        self._put(path, data, replace=True)

    def put_if_absent(self, path: str, data: Buffer) -> None:
        self._put(path, data, replace=False)

    def _put(self, path: str, data: Buffer, *, replace: bool) -> None:
        view = memoryview(data)
        write = self.begin(path, view.nbytes)
        try:
            write.write_at(0, view)
            write.commit(replace=replace)
        finally:
            write.abort()

    def append(self, path: str, data: Buffer) -> None:
        absolute, left = _absolute(path), memoryview(data).cast("B")
        safe = "Some of it may have been added."
        with translated("appending to", path, phase="append", safe=safe):
            existing, missing = existing_part(self._ops, os.path.dirname(absolute), absolute)
            if missing:
                make_directories(self._ops, existing, missing)
            descriptor = self._ops.open_append(absolute)
            try:
                while left:
                    with contextlib.suppress(InterruptedError):
                        # At the file's end, whatever the offset says: that is what it was opened for.
                        written = self._ops.pwrite(descriptor, left, 0)
                        if written <= 0:
                            raise wrote_nothing("appending to", path, phase="append", safe=safe)
                        left = left[written:]
            finally:
                self._ops.close(descriptor)

    def open(self, path: str) -> LocalFile:
        _absolute(path)
        return open_local_file(self._ops, path)

    def exists(self, path: str) -> bool:
        with translated("looking for", path, phase="exists", safe=UNCHANGED):
            try:
                self._ops.status(_absolute(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def list(self, path: str) -> list[str]:
        with translated("listing", path, phase="list", safe=UNCHANGED):
            try:
                names = self._ops.list_directory(_absolute(path))
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(name for name in names if not is_temporary(name) and not is_lock(name))

    def delete(self, path: str) -> None:
        absolute = _absolute(path)
        with translated("deleting", path, phase="delete", safe="The file may still be there."):
            refuse_directory(self._ops, absolute)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._ops.unlink(absolute)
            # Even if it was gone already: whoever removed it may have died before that was durable.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                sync_directory(self._ops, os.path.dirname(absolute))

    def rename(self, path: str, new_path: str) -> None:
        source, target = _absolute(path), _absolute(new_path)
        with translated("renaming", path, phase="rename", safe="It has its old name."):
            try:
                rename_directory(self._ops, source, target)
            except FileNotFoundError as error:
                raise not_found(path) from error
            except FileExistsError as error:
                raise name_taken(new_path) from error
        safe = "It has its new name, but a power cut may bring back the old one."
        with translated("fsyncing the directory of", new_path, phase="rename", safe=safe):
            sync_directory(self._ops, os.path.dirname(target))

    def settle(self, path: str) -> None:
        absolute = _absolute(path)
        not_there = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with translated("fsyncing", path, phase="settle", safe=UNCHANGED), not_there:
            sync_directory(self._ops, absolute)

    def has_writers(self, path: str) -> bool:
        absolute = _absolute(path)
        with translated("listing", path, phase="list", safe=UNCHANGED):
            return is_written_in(self._ops, absolute)

    def delete_directory(self, path: str) -> bool:
        absolute = _absolute(path)
        with translated("deleting", path, phase="delete", safe="The directory may still be there."):
            return remove_if_empty(self._ops, absolute)


def _absolute(path: str) -> str:
    """The path from the root, so that a later change of working directory cannot move a file that is being written.

    ``..`` stays as it is: after a symbolic link it does not mean what its letters say.
    """
    if not path or "\0" in path:
        raise ConfigError(f"{path!r} is not a path: it is empty, or has a zero byte in it")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path!r} cannot be the name of a file here: {error}") from error
    return os.path.join(os.getcwd(), path)
