"""Something that users ask lastgood for, as the tests of faults see it: what was before, and what has to follow."""

import abc
import os
from pathlib import Path
from typing import ClassVar

from tests.storage.recording import drop_from_page_cache

from lastgood.errors import LastgoodError, StorageError
from lastgood.storage._durable_write import is_temporary
from lastgood.storage._file_lock import is_lock
from lastgood.storage.file_ops import FileOps

DURABLE_WRITE = frozenset({"open_exclusive", "pwrite", "fsync", "replace", "fsync_directory"})
READ = frozenset({"open_read", "pread_into"})

LEFT_BY_A_FAILURE = 2
"""A temporary and a lock: nothing that fails leaves more."""


class Reported(StorageError):
    """A failure that lastgood tells of in what it returns, and does not raise."""


class Action(abc.ABC):
    """Its methods are called in this order, :meth:`prepare` by an object of its own.

    Between :meth:`look` and :meth:`go_on` all faults end. :meth:`go_on` may be called again, after a failure too.
    """

    name: ClassVar[str]
    only_reads: ClassVar[bool] = False
    indispensable: ClassVar[frozenset[str]]
    """Operations without which it cannot have gone well: if an error of one of them is ignored, something is lost."""

    timeout_secs = 600.0
    """What a call of the operating system may take in :meth:`act`."""

    @abc.abstractmethod
    def prepare(self, root: Path) -> None:
        """Put there what is there before."""

    @abc.abstractmethod
    def act(self, root: Path, ops: FileOps) -> None:
        """Ask for it, make sure of what comes back, and raise what lastgood raises."""

    @abc.abstractmethod
    def look(self, root: Path, failure: LastgoodError | None) -> None:
        """Whatever has happened: what was there before is there, or what came, and hardly anything else."""

    @abc.abstractmethod
    def go_on(self, root: Path) -> None:
        """What the process does next, with the same objects."""

    @abc.abstractmethod
    def assert_acknowledged(self, root: Path) -> None:
        """What :meth:`go_on` has made durable is found, bit for bit."""

    @abc.abstractmethod
    def assert_tidy(self, root: Path) -> None:
        """Nothing is left of what failed before."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Give everything back."""


def leftovers(directory: Path) -> list[str]:
    """Temporaries and locks, in the directory and below it."""
    return [path.name for path in directory.rglob("*") if is_temporary(path.name) or is_lock(path.name)]


def names(directory: Path) -> list[str]:
    """Everything directly in a directory."""
    return sorted(os.listdir(directory))


def drop_all_from_page_cache(directory: Path) -> None:
    """Let the next reads of the files below it go to the device."""
    for path in directory.rglob("*"):
        if path.is_file():
            drop_from_page_cache(path)
