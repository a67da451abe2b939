"""Finding the value under a key, and what somebody may have meant who mistyped one."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lastgood._contents import FileContents
from lastgood._contents.reading import values
from lastgood.errors import CheckpointNotFoundError, ConfigError
from lastgood.format.nodes import DictNode, MapNode, Node, OrderedDictNode, ShardedNode, join_path, keyed_children

_COMPARED = 2000
_SUGGESTED = 5


def find_key(files: Sequence[FileContents], key: str) -> tuple[FileContents, Node]:
    """The first file that has the key, and the node under it.

    Raises :class:`~lastgood.errors.CheckpointNotFoundError`, naming keys that are nearly the same, or
    :class:`~lastgood.errors.ConfigError` for a key that two different values of one file have.
    """
    paths: dict[str, None] = {}
    for file in files:
        found = []
        for path, node in values(file):
            if path == key:
                found.append(node)
            paths[path] = None
        if len(found) > 1:
            raise ConfigError(
                f"{len(found)} values of {file.path} have the key {key!r}: some keys have dots in them. Only "
                "lastgood.load can tell them apart.",
                path=file.path,
            )
        if found:
            return file, found[0]
    where = files[0].path if len(files) == 1 else f"any of the {len(files)} files"
    near = near_keys(list(paths), key)
    hint = f" Did you mean {', '.join(near)}?" if near else " 'lastgood inspect' lists the keys."
    raise CheckpointNotFoundError(f"there is no key {key!r} in {where}.{hint}", path=files[0].path)


@dataclass(frozen=True)
class Way:
    """How to get to the value under a key path: by ``keys`` of nested dicts, and from there by ``positions``.

    Positions count what is in a list, or the values of a dict with keys that only a loaded state has.
    """

    keys: tuple[Any, ...]
    positions: tuple[int, ...]

    def target(self) -> Any:
        """A target that asks for just this value, or for what it stands in."""
        wanted: Any = None
        for key in reversed(self.keys):
            wanted = {key: wanted}
        return wanted

    def follow(self, state: Any) -> Any:
        """The value in a state that was loaded."""
        for key in self.keys:
            state = state[key]
        for position in self.positions:
            state = (list(state.values()) if isinstance(state, dict) else state)[position]
        return state


def ways(root: Node) -> Iterator[tuple[str, Node, Way]]:
    """All values below ``root`` with their key paths, and how to get to them; a container before what it holds."""
    waiting: list[tuple[str, Node, Way]] = [("", root, Way((), ()))]
    while waiting:
        path, node, way = waiting.pop()
        yield path, node, way
        if not isinstance(node, ShardedNode):
            inside = [
                (join_path(path, name), child, _further(way, node, name, number))
                for number, (name, child) in enumerate(keyed_children(node))
            ]
            waiting += reversed(inside)


def _further(way: Way, node: Node, name: Any, number: int) -> Way:
    plain = isinstance(node, DictNode) or (
        isinstance(node, MapNode | OrderedDictNode) and isinstance(node.items[number][0], str | int | float | bool)
    )
    if plain and not way.positions:
        return Way((*way.keys, name), ())
    return Way(way.keys, (*way.positions, number))


def near_keys(paths: Sequence[str], key: str) -> list[str]:
    """Those of the keys that look most like this one."""
    if len(paths) > _COMPARED:
        # Comparing takes long: those that share a part come first.
        parts = {part for part in key.split(".") if part}
        likely = sorted(paths, key=lambda path: -len(parts.intersection(path.split("."))))
        paths = likely[:_COMPARED]
    return difflib.get_close_matches(key, [path for path in paths if path], _SUGGESTED)
