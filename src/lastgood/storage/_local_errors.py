"""What the operating system said about a local file, in words for the person who has to act on it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lastgood.errors import CheckpointExistsError, CheckpointNotFoundError, LastgoodError, StorageError

UNTOUCHED = "Nothing was published; an earlier checkpoint of this name is untouched."
UNCHANGED = "Nothing was changed."

_REASONS = {
    errno.ENOSPC: "no space is left on the file system; free some or choose another path",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another path",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "permission denied; look at the owner and the mode of the file and its directories",
    errno.EPERM: "the operation is not permitted here; look at the owner, the mode and the attributes of the directory",
    errno.ENAMETOOLONG: "the name is too long for the file system (a file is first written under a temporary name, "
    "which is 22 bytes longer than its final one)",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "the name belongs to a directory",
    errno.ELOOP: "the path goes through too many symbolic links",
    errno.EMFILE: "this process has too many files open; raise the limit (ulimit -n) or find what leaks them",
    errno.ENFILE: "the machine has too many files open",
    errno.EFBIG: "the file is larger than the file system, or this process's limit (ulimit -f), allows",
    errno.EIO: "the device reported an I/O error; look at the kernel's log before trusting it again",
    errno.ESTALE: "the network file system no longer knows the file or its directory",
}


def storage_error(error: OSError, action: str, path: str, *, phase: str, safe: str) -> StorageError:
    """The :class:`StorageError` for a failed ``action`` ("writing") on ``path``; raise it ``from error``.

    ``safe`` is a sentence: what the failure has left as it was.
    """
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    where = error.filename if isinstance(error.filename, str) and error.filename != path else None
    at = f" (at {where})" if where and not where.endswith(".tmp") else ""
    return StorageError(f"{action} {path} failed{at}: {reason}. {safe}", errno=error.errno, path=path, phase=phase)


def wrote_nothing(action: str, path: str, *, phase: str, safe: str) -> StorageError:
    """The error for a write of some bytes that took none: going on would go on for ever."""
    return StorageError(
        f"{action} {path} failed: the operating system wrote nothing and gave no reason. {safe}",
        errno=errno.EIO,
        path=path,
        phase=phase,
    )


@contextmanager
def translated(action: str, path: str, *, phase: str, safe: str = UNTOUCHED) -> Iterator[None]:
    """Turn what the operating system raises in the block into a :class:`StorageError`; ours pass as they are."""
    try:
        yield
    except LastgoodError:
        raise
    except OSError as error:
        raise storage_error(error, action, path, phase=phase, safe=safe) from error


def not_found(path: str) -> CheckpointNotFoundError:
    """The error for a file that is not there."""
    error = CheckpointNotFoundError(f"there is no file {path}", path=path, phase="open")
    error.errno = errno.ENOENT
    return error


def name_taken(path: str) -> CheckpointExistsError:
    """The error for a name that must not be replaced."""
    error = CheckpointExistsError(
        f"{path} exists already and may not be replaced; it has not been touched. Choose another path.",
        path=path,
        phase="publish",
    )
    error.errno = errno.EEXIST
    return error


def not_enough_space(path: str, needed: int, available: int | None) -> StorageError:
    """The error for a file that is larger than what its file system has left."""
    left = "less than that is" if available is None else f"{_bytes(available)} are"
    return StorageError(
        f"not enough space for {path}: {_bytes(needed)} are needed, {left} available on its file system. "
        f"{UNTOUCHED} Free some space or choose another path.",
        errno=errno.ENOSPC,
        path=path,
        phase="reserve",
    )


def _bytes(count: int) -> str:
    return f"{count} bytes ({count / (1 << 20):.1f} MiB)" if count >= 1 << 20 else f"{count} bytes"
