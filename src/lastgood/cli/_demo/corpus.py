"""The text that the demo learns: the source code of Python's own standard library, found on every machine."""

import sysconfig
from pathlib import Path

from lastgood.errors import LastgoodError

_WANTED_BYTES = 2 * 1024 * 1024
"""Plenty for a training of minutes, and read in a moment."""


def standard_library() -> Path:
    """The directory that holds the standard library of this Python."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(directory: Path | None = None) -> bytes:
    """The modules of ``directory`` (the standard library) one after the other, by name, up to about 2 MiB.

    The same installation gives the same bytes, always: a resumed run has to find its place in them again.
    """
    directory = standard_library() if directory is None else directory
    text = bytearray()
    for path in sorted(directory.glob("*.py"), key=lambda path: path.name):
        text += path.read_bytes()
        if len(text) >= _WANTED_BYTES:
            break
    if not text:
        raise LastgoodError(
            f"the demo learns the source code of Python's standard library, and there is none in {directory}: "
            "run it with a Python whose library is installed as .py files",
            path=str(directory),
        )
    return bytes(text)
