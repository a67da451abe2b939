"""``lastgood.save`` and ``lastgood.load``: what ``torch.save`` and ``torch.load`` do for one file, kept safe."""

import os
from typing import Any

import msgspec

from lastgood import _events
from lastgood._image_writer import new_save_id, write_durably
from lastgood._loading.file import load_file
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS
from lastgood._loading.storages import MapLocation
from lastgood.capture import capture
from lastgood.errors import ConfigError, require_all
from lastgood.format.index_head import UNSAVED
from lastgood.storage._in_time import StorageInTime
from lastgood.storage.local import LocalStorage


def save(obj: Any, file: str | os.PathLike[str]) -> None:
    """Save ``obj`` as one file that ``torch.load`` reads; when this returns, it survives a power cut.

    A file of that name is replaced atomically: until then it stays as it was, and so it does if this raises. Memory
    is bounded, whatever the size of ``obj``. Raises :class:`~lastgood.errors.UnsupportedStateError` for a value that
    cannot be saved, :class:`~lastgood.errors.StorageError` where the operating system fails.
    """
    path = _path_of(file)
    with _events.phase("save", path):
        with _events.phase("capture", path):
            image = capture(obj).image(msgspec.structs.replace(UNSAVED, save_id=new_save_id()))
        upload = write_durably(
            image, LocalStorage(), path, rank=None, no_progress_timeout_secs=NO_PROGRESS_TIMEOUT_SECS
        )
        try:
            with _events.phase("commit", path):
                upload.commit()
        except BaseException:
            upload.abort()
            raise


def load(
    file: str | os.PathLike[str],
    target: Any = None,
    *,
    map_location: MapLocation = None,
    mmap: bool = False,
    verify: bool = True,
    verify_first: bool = False,
    strict: bool = False,
) -> Any:
    """Load one file, written by :func:`save`, by a checkpointer or by ``torch.save``; nothing from it is executed.

    Without ``target``, everything, newly made. With a ``target`` (a nested dict), just its keys, into its tensors in
    place; it is returned. With ``strict``, :class:`~lastgood.errors.MissingKeysError` names keys that are not in the
    file. All that is read is compared with its checksums, unless ``verify=False``; ``verify_first=True`` checks the
    whole file before any target is touched; ``mmap=True`` maps it lazily and checks nothing but its index.
    ``map_location`` is that of ``torch.load``.
    """
    path = _path_of(file)
    opened = StorageInTime(LocalStorage(), NO_PROGRESS_TIMEOUT_SECS).open_unwatched(path)
    try:
        loaded, missing = load_file(
            opened, target, map_location=map_location, mmap=mmap, verify=verify, verify_first=verify_first
        )
    finally:
        opened.close()
    return require_all(loaded, missing, path, strict=strict)


def _path_of(file: str | os.PathLike[str]) -> str:
    if isinstance(file, (str, os.PathLike)):
        path = os.fspath(file)
        if isinstance(path, str):
            return path
    raise ConfigError(
        f"lastgood saves to and loads from paths, not from a {type(file).__name__}: only a named file can be made "
        "durable and replaced atomically. For a buffer in memory, use torch.save and torch.load."
    )
