"""What is in a file that ``torch.save`` wrote: its pickle described, its storages found, and nothing of it run."""

import struct
from collections.abc import Callable
from typing import Any

from lastgood._contents.describing_rules import DescribedStorage, DescribingRules, storage_kind
from lastgood._contents.model import FileContents, StoredBytes
from lastgood._contents.pickle_nodes import nodes_of
from lastgood._loading.pickle_symbols import ListSymbol, TupleSymbol, is_count
from lastgood._loading.pickle_walk import IncompletePickleError, walk_pickle
from lastgood._loading.zip_directory import ZipRecord, is_zip, read_directory
from lastgood.errors import corrupt
from lastgood.format.index import StorageEntry
from lastgood.format.spec import UNTYPED
from lastgood.storage.base import StoredFile

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_LEGACY_START = b"\x80\x02\x8a"
_FIRST_WINDOW = 1024 * 1024
_COUNT = struct.Struct("<q")


def describe_torch_file(file: StoredFile) -> FileContents:
    """What a file of torch's holds.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for one that is not whole or is no file of torch's,
    :class:`~lastgood.errors.UnsafeCheckpointError` for a pickle that ``torch.save`` never writes.
    """
    return describe_zip(file, read_directory(file)) if is_zip(file) else _describe_legacy(file)


class _Storages:
    """The storages that a pickle names, numbered in the order in which it does."""

    def __init__(self, rules: DescribingRules, size_of: Callable[[str], int | None]) -> None:
        self.entries: list[StorageEntry] = []
        self.keys: list[str] = []
        self._rules = rules
        self._size_of = size_of
        self._numbers: dict[str, int] = {}

    def claim(self, identity: tuple[Any, ...]) -> DescribedStorage:
        """The storage behind a persistent id of torch's: ("storage", class, key, location, elements[, part])."""
        if len(identity) not in (5, 6) or identity[0] != "storage":
            self._rules.broken("a reference to something that is not a storage")
        _, storage_class, key, location, numel = identity[:5]
        kind = storage_kind(storage_class)
        if kind is None or type(key) is not str or type(location) is not str or not is_count(numel):
            self._rules.broken("a storage of no known kind")
        dtype, itemsize = kind
        nbytes, size = numel * itemsize, self._size_of(key)
        if size is None or nbytes > size:
            self._rules.broken(f"the storage {key!r}, which the file does not hold or not in full")
        number = self._numbers.setdefault(key, len(self.entries))
        if number == len(self.entries):
            self.entries.append(StorageEntry(nbytes, dtype, location))
            self.keys.append(key)
        entry = self.entries[number]
        entry.nbytes = max(nbytes, entry.nbytes)
        if entry.dtype != dtype:
            entry.dtype = UNTYPED
        part = identity[5] if len(identity) == 6 else None
        if part is None:
            return DescribedStorage(number, nbytes, dtype)
        if not isinstance(part, TupleSymbol) or len(part.items) != 3 or not all(map(is_count, part.items[1:])):
            self._rules.broken("a part of a storage that says not which")
        _, offset, length = part.items
        if offset + length > numel:
            self._rules.broken(f"a part of the storage {key!r} that lies outside it")
        return DescribedStorage(number, length * itemsize, dtype, offset)


def describe_zip(file: StoredFile, records: dict[str, ZipRecord]) -> FileContents:
    """What a zip archive of torch's holds, whose directory has been read."""
    prefix = next(iter(records), "").partition("/")[0]
    record = records.get(f"{prefix}/data.pkl")
    if record is None:
        raise corrupt(file.path, "it is a zip archive without the record data.pkl, so no checkpoint")
    data = _read(file, record.offset, record.size)
    rules = DescribingRules(file.path, len(data))

    def stored(key: str) -> ZipRecord | None:
        return records.get(f"{prefix}/data/{key}".lower())

    def size_of(key: str) -> int | None:
        found = stored(key)
        return None if found is None else found.size

    storages = _Storages(rules, size_of)
    value = _walk(data, rules, storages)
    found = [stored(key) for key in storages.keys]
    order = records.get(f"{prefix}/byteorder")
    byteorder = _read(file, order.offset, min(order.size, 16)).decode("latin-1") if order is not None else "little"
    return FileContents(
        path=file.path,
        nbytes=file.size,
        kind="torch zip",
        root=nodes_of(value, rules, len(data)),
        storages=storages.entries,
        places=[StoredBytes(place.offset, place.crc) for place in found if place is not None],
        byteorder=byteorder,
    )


def _describe_legacy(file: StoredFile) -> FileContents:
    """Before version 1.6: five pickles (magic, version, system, value, storage keys), then the storages' data."""
    size = min(_FIRST_WINDOW, file.size)
    while True:
        window = _read(file, 0, size)
        if not window.startswith(_LEGACY_START):
            raise corrupt(file.path, "it does not begin like a file that torch.save or lastgood writes")
        rules = DescribingRules(file.path, size)
        storages = _Storages(rules, lambda key: file.size)
        try:
            return _legacy_contents(file, window, rules, storages)
        except IncompletePickleError:
            if size == file.size:
                raise corrupt(file.path, "it ends in the middle of a pickle") from None
            size = min(8 * size, file.size)


def _legacy_contents(file: StoredFile, window: bytes, rules: DescribingRules, storages: _Storages) -> FileContents:
    values, position = [], 0
    for _ in range(5):
        value, position = walk_pickle(window, position, rules, storages.claim)
        values.append(value)
    magic, version, _, root, keys = values
    if (magic, version) != (_MAGIC, _PROTOCOL_VERSION):
        raise corrupt(file.path, "it does not begin like a file that torch.save or lastgood writes")
    if not isinstance(keys, ListSymbol) or set(storages.keys) != set(keys.items):
        raise corrupt(file.path, "it holds other tensor data than its pickle names")
    numbers = {key: number for number, key in enumerate(storages.keys)}
    places: dict[int, StoredBytes] = {}
    for key in keys.items:
        places[numbers[key]] = StoredBytes(position + _COUNT.size)
        position += _COUNT.size + storages.entries[numbers[key]].nbytes
        if position > file.size:
            raise corrupt(file.path, "it is cut off in the data of its tensors")
    return FileContents(
        path=file.path,
        nbytes=file.size,
        kind="torch legacy",
        root=nodes_of(root, rules, len(window)),
        storages=storages.entries,
        places=[places[number] for number in range(len(places))],
        byteorder="little",
    )


def _walk(data: bytes, rules: DescribingRules, storages: _Storages) -> Any:
    try:
        return walk_pickle(data, 0, rules, storages.claim)[0]
    except IncompletePickleError:
        rules.broken("it has no end")


def _read(file: StoredFile, offset: int, size: int) -> bytes:
    target = bytearray(size)
    file.read_into(offset, memoryview(target))
    return bytes(target)
