"""Directories as a whole: another name for one, and the end of one that nothing is left in."""

import errno
import os

from lastgood.storage._durable_write import clear_abandoned, is_temporary, sync_directory
from lastgood.storage._file_lock import clear_free_lock, is_held, is_lock
from lastgood.storage.file_ops import NOT_SUPPORTED, FileOps

_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


def rename_directory(ops: FileOps, source: str, target: str) -> None:
    """Rename without replacing; ``FileExistsError`` if the name is taken, ``FileNotFoundError`` if nothing is there."""
    if not ops.status(source).is_directory:
        raise FileNotFoundError(errno.ENOENT, "there is no such directory", source)
    try:
        ops.rename_without_replacing(source, target)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        # Here a rename puts a directory in the place of an empty one at most, so nothing can be lost to it.
        try:
            ops.replace(source, target)
        except NotADirectoryError as taken:
            raise FileExistsError(errno.EEXIST, "the name belongs to a file", target) from taken
        except OSError as failure:
            if failure.errno in _NOT_EMPTY:
                raise FileExistsError(errno.EEXIST, "the name is taken", target) from failure
            raise


def is_written_in(ops: FileOps, directory: str) -> bool:
    """Whether there is a temporary whose writer lives, or a lock that somebody holds."""
    try:
        entries = ops.list_directory(directory)
    except (FileNotFoundError, NotADirectoryError):
        return False
    traces = [name for name in entries if is_temporary(name) or is_lock(name)]
    return any(is_held(ops, os.path.join(directory, name)) for name in traces)


def remove_if_empty(ops: FileOps, directory: str) -> bool:
    """Remove a directory, with what dead writers have left in it, if nothing else is there; whether it is gone."""
    try:
        entries = ops.list_directory(directory)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    if not all(is_temporary(name) or is_lock(name) for name in entries):
        return False
    for name in entries:
        if is_lock(name):
            clear_free_lock(ops, os.path.join(directory, name))
    clear_abandoned(ops, directory)
    try:
        ops.remove_directory(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in _NOT_EMPTY:
            return False
        raise
    sync_directory(ops, os.path.dirname(directory))
    return True
