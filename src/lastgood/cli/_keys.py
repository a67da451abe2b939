"""Finding the value under a key, and what somebody may have meant who mistyped one."""

import difflib
from collections.abc import Sequence

from lastgood._contents import FileContents
from lastgood._contents.reading import values
from lastgood.errors import CheckpointNotFoundError, ConfigError
from lastgood.format.index import Node

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


def near_keys(paths: Sequence[str], key: str) -> list[str]:
    """Those of the keys that look most like this one."""
    if len(paths) > _COMPARED:
        # Comparing takes long: those that share a part come first.
        parts = {part for part in key.split(".") if part}
        likely = sorted(paths, key=lambda path: -len(parts.intersection(path.split("."))))
        paths = likely[:_COMPARED]
    return difflib.get_close_matches(key, [path for path in paths if path], _SUGGESTED)
