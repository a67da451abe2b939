"""What a disk holds for certain, and what it may hold after a power cut: a replay of everything that was changed.

The running file system tells each change it makes; :class:`Disk` takes them in order and knows, for the moment after
the last one, all the states in which a power cut could leave the disk. See
:class:`~lastgood.testing.crash_file_ops.CrashFileOps` for the assumptions.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from lastgood.testing._crash_pages import FileOnDisk

ROOT = 1
"""The number of the root directory."""

IsCoarse: TypeAlias = Callable[[str], bool]
"""Whether only the two extreme states of the file at this path are of interest."""

_LIKELIHOODS = (0.0, 0.15, 0.5, 0.85, 1.0)


class Place(NamedTuple):
    """A name in the directory of this number."""

    directory: int
    name: str


class Made(NamedTuple):
    """A file or directory that has no name yet."""

    number: int
    is_directory: bool


class Written(NamedTuple):
    """Bytes given to a file."""

    number: int
    offset: int
    data: bytes


class Resized(NamedTuple):
    """A file that got another length."""

    number: int
    size: int


class Synced(NamedTuple):
    """A file whose bytes and length are on the disk now; or, if it failed, are as they may be for ever."""

    number: int
    failed: bool = False


class Named(NamedTuple):
    """Names that went and names that came, in one atomic operation."""

    gone: tuple[Place, ...]
    come: tuple[tuple[Place, int], ...]


class NamesSynced(NamedTuple):
    """A directory whose names are on the disk now."""

    number: int


Change: TypeAlias = Made | Written | Resized | Synced | Named | NamesSynced
Names: TypeAlias = Mapping[int, Mapping[str, int]]


@dataclass(frozen=True)
class Image:
    """A whole disk: the names in each directory, and the bytes of each file, by number."""

    directories: Names
    files: Mapping[int, bytes]

    def tree(self) -> dict[str, int]:
        """The number of everything that has a path, by path; that of the root is ``/``."""
        return tree_of(self.directories)

    def digest(self) -> str:
        """The same for two disks on which the same files are found under the same paths."""
        digest = hashlib.blake2b(digest_size=16)
        first_names: dict[int, str] = {}
        for path, number in sorted(self.tree().items()):
            digest.update(path.encode(errors="surrogateescape") + b"\0")
            if number in self.files:
                # Two names of one file are another state than two files with the same bytes.
                digest.update(first_names.setdefault(number, path).encode(errors="surrogateescape") + b"\0")
                digest.update(_digest_of(self.files[number]))
        return digest.hexdigest()


@lru_cache(maxsize=4096)
def _digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def tree_of(directories: Names) -> dict[str, int]:
    """See :meth:`Image.tree`."""
    found = {"/": ROOT}
    waiting = [("", ROOT)]
    while waiting:
        path, number = waiting.pop()
        for name, child in directories[number].items():
            found[f"{path}/{name}"] = child
            if child in directories:
                waiting.append((f"{path}/{name}", child))
    return found


class _PendingNames:
    """A change of names, and the directories that have to be synced before it is there for certain."""

    def __init__(self, change: Named) -> None:
        self.change = change
        self.directories = frozenset(place.directory for place in change.gone) | {
            place.directory for place, _ in change.come
        }
        self.unsynced = set(self.directories)


class Disk:
    """A disk after a number of changes: what is on it for certain, and what may be."""

    def __init__(self, image: Image) -> None:
        self._names: dict[int, dict[str, int]] = {number: dict(names) for number, names in image.directories.items()}
        self._files = {number: FileOnDisk(data) for number, data in image.files.items()}
        self._pending: list[_PendingNames] = []

    def apply(self, change: Change) -> None:
        """Take in the next change."""
        match change:
            case Made(number, is_directory):
                if is_directory:
                    self._names[number] = {}
                else:
                    self._files[number] = FileOnDisk(b"")
            case Written(number, offset, data):
                self._files[number].write(offset, data)
            case Resized(number, size):
                self._files[number].resize(size)
            case Synced(number, failed):
                self._files[number].sync(failed=failed)
            case Named():
                self._pending.append(_PendingNames(change))
            case NamesSynced(number):
                self._sync_names(number)

    def _sync_names(self, directory: int) -> None:
        left: list[_PendingNames] = []
        blocked: set[int] = set()
        for pending in self._pending:
            pending.unsynced.discard(directory)
            if pending.unsynced or pending.directories & blocked:
                # What comes later in the same directories has to be applied after it.
                left.append(pending)
                blocked |= pending.directories
            else:
                _rename(self._names, pending.change)
        self._pending = left

    # States after a power cut

    def images(self, is_coarse: IsCoarse) -> Iterator[Image]:
        """Every one of them, some more than once."""
        for directories in self._possible_names():
            paths = self._files_in(directories)
            options = [self._options(number, path, is_coarse) for number, path in paths.items()]
            for contents in itertools.product(*options):
                yield Image(directories, dict(zip(paths, contents, strict=True)))

    def count(self, is_coarse: IsCoarse) -> int:
        """How many :meth:`images` gives."""
        total = 0
        for directories in self._possible_names():
            product = 1
            for number, path in self._files_in(directories).items():
                product *= len(self._options(number, path, is_coarse))
            total += product
        return total

    def drawn(self, rng: random.Random) -> Image:
        """One of them, at random. Which one depends on nothing but the changes so far and ``rng``."""
        likelihood, key = rng.choice(_LIKELIHOODS), rng.getrandbits(64)
        chance = random.Random(f"{key}/names")
        # One number for each, asked for or not: what one of them does changes nothing about the others.
        chosen = [chance.random() < likelihood or not pending.unsynced for pending in self._pending]
        directories = self._names_with(list(itertools.compress(self._pending, chosen)))
        files = {
            number: self._files[number].drawn(random.Random(f"{key}/{number}"), likelihood)
            for number in self._files_in(directories)
        }
        return Image(directories, files)

    def everything(self) -> Image:
        """All that was done is there: what is found when the process was killed and the machine goes on."""
        directories = self._names_with(self._pending)
        return Image(directories, {number: self._files[number].latest() for number in self._files_in(directories)})

    def _options(self, number: int, path: str, is_coarse: IsCoarse) -> Sequence[bytes]:
        file = self._files[number]
        return file.extremes() if is_coarse(path) else file.possible()

    def _possible_names(self) -> Iterator[Names]:
        """Each different tree once."""
        free = [pending for pending in self._pending if pending.unsynced]
        seen: set[tuple[tuple[str, int], ...]] = set()
        for choices in itertools.product((True, False), repeat=len(free)):
            left_out = {id(pending) for pending, chosen in zip(free, choices, strict=True) if not chosen}
            names = self._names_with(pending for pending in self._pending if id(pending) not in left_out)
            key = tuple(sorted(tree_of(names).items()))
            if key not in seen:
                seen.add(key)
                yield names

    def _names_with(self, pending: Iterable[_PendingNames]) -> Names:
        """All directories that have a path then."""
        names = {number: dict(inside) for number, inside in self._names.items()}
        for each in pending:
            _rename(names, each.change)
        reachable = set(tree_of(names).values())
        return {number: inside for number, inside in names.items() if number in reachable}

    def _files_in(self, directories: Names) -> dict[int, str]:
        """A path of each file, by its number."""
        return {number: path for path, number in sorted(tree_of(directories).items()) if number not in directories}


def _rename(names: dict[int, dict[str, int]], change: Named) -> None:
    for place in change.gone:
        names[place.directory].pop(place.name, None)
    for place, number in change.come:
        names[place.directory][place.name] = number
