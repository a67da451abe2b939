"""The files of a running :class:`~lastgood.testing.crash_file_ops.CrashFileOps`, as its processes see them.

Every change is made here and returned, for the record. Failures are the ``OSError`` that Linux would raise.
"""

import errno
import os

from lastgood.testing._crash_disk import ROOT, Change, Image, Made, Named, Place, Resized, Written
from lastgood.testing._crash_pages import PAGE_SIZE

_LONGEST_NAME = 255


def failure(number: int, path: str | None = None) -> OSError:
    """The ``OSError`` of this number."""
    return OSError(number, os.strerror(number), path)


class Node:
    """A file, or a directory with ``entries``. ``users`` counts the descriptors that are open for it."""

    def __init__(self, number: int, data: bytes | bytearray = b"", entries: "dict[str, Node] | None" = None) -> None:
        self.number = number
        self.data = data
        self.entries = {} if entries is None else entries
        self.is_directory = entries is not None
        self.users = 0
        self.links = 0
        self.pages: set[int] | None = None
        """Which pages of it take up space; ``None`` if all do."""
        self.owner: int | None = None
        self.sharers: set[int] = set()

    @property
    def page_count(self) -> int:
        return -(-len(self.data) // PAGE_SIZE) if self.pages is None else len(self.pages)


class Tree:
    """Files and directories by path. ``capacity``: how many bytes there is room for, ``None`` for no limit."""

    def __init__(self, image: Image, capacity: int | None) -> None:
        self.capacity = capacity
        self._next_number = 1 + max([*image.directories, *image.files])
        self._nodes = {number: Node(number, data) for number, data in image.files.items()}
        self._nodes.update((number, Node(number, entries={})) for number in image.directories)
        for number, names in image.directories.items():
            for name, child in names.items():
                self._nodes[number].entries[name] = self._nodes[child]
                self._nodes[child].links += 1
        self.root = self._nodes[ROOT]
        self.root.links += 1

    def image(self) -> Image:
        """All that has a path."""
        directories: dict[int, dict[str, int]] = {}
        files: dict[int, bytes] = {}
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            if node.is_directory:
                directories[node.number] = {name: child.number for name, child in node.entries.items()}
                waiting.extend(node.entries.values())
            else:
                files[node.number] = bytes(node.data)
        return Image(directories, files)

    # Finding

    def find(self, path: str) -> Node:
        """What stands at a path."""
        passed = [self.root]
        for name in path.split("/"):
            if not passed[-1].is_directory:
                raise failure(errno.ENOTDIR, path)
            if name == "..":
                passed = passed[:-1] or passed
            elif name not in ("", "."):
                passed.append(self._child(passed[-1], name, path))
        return passed[-1]

    def _child(self, directory: Node, name: str, path: str) -> Node:
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise failure(errno.ENAMETOOLONG, path)
        try:
            return directory.entries[name]
        except KeyError:
            raise failure(errno.ENOENT, path) from None

    def find_directory(self, path: str) -> Node:
        """The directory at a path."""
        found = self.find(path)
        if not found.is_directory:
            raise failure(errno.ENOTDIR, path)
        return found

    def _place(self, path: str) -> tuple[Node, str, Node | None]:
        """The directory that a name stands or would stand in, the name, and what has it now."""
        directory, name = self._directory_above(path)
        try:
            return directory, name, self._child(directory, name, path)
        except FileNotFoundError:
            return directory, name, None

    def _directory_above(self, path: str) -> tuple[Node, str]:
        above, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise failure(errno.EBUSY, path)
        return self.find_directory(above), name

    # Names

    def _make(self, *, is_directory: bool) -> Node:
        node = Node(self._next_number, bytearray(), {} if is_directory else None)
        node.pages = set()
        self._next_number += 1
        self._nodes[node.number] = node
        return node

    def _come(self, directory: Node, name: str, node: Node) -> tuple[Place, int]:
        directory.entries[name] = node
        node.links += 1
        return Place(directory.number, name), node.number

    def _go(self, directory: Node, name: str) -> Place:
        node = directory.entries.pop(name)
        node.links -= 1
        self.let_go(node)
        return Place(directory.number, name)

    def let_go(self, node: Node) -> None:
        """Forget a file that has neither a name nor a user any more."""
        if not node.links and not node.users:
            self._nodes.pop(node.number, None)

    def create(self, path: str, *, is_directory: bool = False) -> tuple[Node, list[Change]]:
        """A new file or directory under a name that is free."""
        directory, name, taken = self._place(path)
        if taken is not None:
            raise failure(errno.EEXIST, path)
        node = self._make(is_directory=is_directory)
        come = self._come(directory, name, node)
        return node, [Made(node.number, is_directory), Named((), (come,))]

    def link(self, existing: str, new: str) -> list[Change]:
        """A second name for a file."""
        node = self.find(existing)
        directory, name, taken = self._place(new)
        if taken is not None:
            raise failure(errno.EEXIST, new)
        if node.is_directory:
            raise failure(errno.EPERM, existing)
        return [Named((), (self._come(directory, name, node),))]

    def unlink(self, path: str) -> list[Change]:
        """A file's name is gone."""
        directory, name, node = self._place(path)
        if node is None:
            raise failure(errno.ENOENT, path)
        if node.is_directory:
            raise failure(errno.EISDIR, path)
        return [Named((self._go(directory, name),), ())]

    def remove_directory(self, path: str) -> list[Change]:
        """An empty directory is gone."""
        directory, name, node = self._place(path)
        if node is None:
            raise failure(errno.ENOENT, path)
        if not node.is_directory:
            raise failure(errno.ENOTDIR, path)
        if node.entries:
            raise failure(errno.ENOTEMPTY, path)
        return [Named((self._go(directory, name),), ())]

    def rename(self, source: str, target: str, *, replace: bool) -> list[Change]:
        """Another name, in one step."""
        for path in (source, target):  # what is wrong with the directories is said first
            self._directory_above(path)
        old_directory, old_name, node = self._place(source)
        if node is None:
            raise failure(errno.ENOENT, source)
        directory, name, taken = self._place(target)
        if taken is not None and not replace:
            raise failure(errno.EEXIST, target)
        if node.is_directory and self._is_within(directory, node):
            raise failure(errno.EINVAL, target)
        if taken is not None and self._is_within(old_directory, taken):
            raise failure(errno.ENOTEMPTY, target)
        if taken is node:
            return []
        if taken is not None:
            _check_may_replace(node, taken, target)
            self._go(directory, name)
        come = self._come(directory, name, node)
        return [Named((self._go(old_directory, old_name),), (come,))]

    def _is_within(self, directory: Node, outer: Node) -> bool:
        return directory is outer or any(
            child.is_directory and self._is_within(directory, child) for child in outer.entries.values()
        )

    # Bytes

    def write(self, node: Node, offset: int, data: bytes) -> list[Change]:
        """As many of these bytes as there is room for."""
        pages = range(offset // PAGE_SIZE, -(-(offset + len(data)) // PAGE_SIZE))
        room = self._take_room(node, pages, all_or_none=False)
        data = data[: room.stop * PAGE_SIZE - offset] if room else b""
        if not data:
            return []
        content = self._writable(node)
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data
        return [Written(node.number, offset, data)]

    def reserve(self, node: Node, size: int) -> list[Change]:
        """Room for so many bytes, which are zeros where there was nothing."""
        self._take_room(node, range(-(-size // PAGE_SIZE)), all_or_none=True)
        return self.resize(node, max(size, len(node.data)))

    def resize(self, node: Node, size: int) -> list[Change]:
        """Another length."""
        content = self._writable(node)
        if len(content) == size:
            return []
        if size < len(content):
            if node.pages is not None:
                node.pages = {page for page in node.pages if page * PAGE_SIZE < size}
            del content[size:]
        else:
            content.extend(bytes(size - len(content)))
        return [Resized(node.number, size)]

    def _writable(self, node: Node) -> bytearray:
        if not isinstance(node.data, bytearray):
            node.data = bytearray(node.data)
        return node.data

    def _take_room(self, node: Node, pages: range, *, all_or_none: bool) -> range:
        """Those of the pages from the first on that there is room for."""
        if node.pages is None:
            node.pages = set(range(node.page_count))
        left = None if self.capacity is None else self.available() // PAGE_SIZE
        wanted = [page for page in pages if page not in node.pages]
        if left is not None and len(wanted) > left:
            if all_or_none or wanted[left] == pages.start:
                raise failure(errno.ENOSPC)
            pages = range(pages.start, wanted[left])
        node.pages.update(pages)
        return pages

    def available(self) -> int:
        """How many bytes there is room for; only where there is a limit."""
        assert self.capacity is not None
        return max(0, self.capacity - PAGE_SIZE * sum(node.page_count for node in self._nodes.values()))


def _check_may_replace(node: Node, taken: Node, target: str) -> None:
    if taken.is_directory:
        if not node.is_directory:
            raise failure(errno.EISDIR, target)
        if taken.entries:
            raise failure(errno.ENOTEMPTY, target)
    elif node.is_directory:
        raise failure(errno.ENOTDIR, target)
