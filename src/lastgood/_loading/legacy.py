"""torch's format before version 1.6: five pickles, then the data of all storages. It has no checksums."""

import struct
from typing import Any

from lastgood._loading.pickle_rules import PickleRules, storage_of
from lastgood._loading.pickle_symbols import ListSymbol, StorageSymbol, is_count
from lastgood._loading.pickle_walk import IncompletePickleError, walk_pickle
from lastgood.errors import corrupt
from lastgood.storage.base import StoredFile

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_FIRST_WINDOW = 1024 * 1024
_COUNT = struct.Struct("<q")


class _Storages:
    """The storages that the pickle names, by key, each with its number of elements."""

    def __init__(self, rules: PickleRules) -> None:
        self.named: dict[str, tuple[StorageSymbol, int]] = {}
        self._rules = rules

    def claim(self, identity: tuple[Any, ...]) -> StorageSymbol:
        if len(identity) != 6 or identity[0] != "storage" or type(identity[2]) is not str:
            self._rules.broken("a reference to something that is not a storage")
        key, numel, part = identity[2], identity[4], identity[5]
        storage = storage_of(identity[1], numel)
        if storage is None:
            self._rules.broken("a storage of no known kind")
        known, known_numel = self.named.setdefault(key, (storage, numel))
        # Keys are addresses, and empty storages share theirs.
        same = (known_numel, known.element_bits) == (numel, storage.element_bits)
        if not same and (known_numel or numel):
            self._rules.broken(f"two sizes for the storage {key!r}")
        if part is None:
            return known
        _, offset, size = part.items
        inner = storage_of(identity[1], size)
        if inner is None or not is_count(offset) or offset + size > numel:
            self._rules.broken(f"a part of the storage {key!r} that lies outside it")
        return inner


def check_legacy(file: StoredFile) -> None:
    """Refuse a file that is not whole, or whose pickles make anything but values on the storages that it holds."""
    size = min(_FIRST_WINDOW, file.size)
    while True:
        window = bytearray(size)
        file.read_into(0, memoryview(window))
        try:
            storages, keys, position = _walk(file, window)
            break
        except IncompletePickleError:
            if size == file.size:
                raise corrupt(file.path, "it ends in the middle of a pickle") from None
            size = min(8 * size, file.size)
    for key in keys:
        storage, numel = storages.pop(key, (None, 0))
        if storage is None or position + _COUNT.size + storage.nbytes > file.size:
            raise corrupt(file.path, "it is cut off, or holds other tensor data than its pickle names")
        count = bytearray(_COUNT.size)
        file.read_into(position, memoryview(count))
        if _COUNT.unpack(count)[0] != numel:
            raise corrupt(file.path, "its pickle and its tensor data are of different sizes")
        position += _COUNT.size + storage.nbytes
    if storages:
        raise corrupt(file.path, "it lacks the data of some of its tensors")


def _walk(file: StoredFile, window: bytearray) -> tuple[dict[str, tuple[StorageSymbol, int]], list[Any], int]:
    rules = PickleRules(file.path, file.size)
    if not window.startswith(b"\x80\x02\x8a"):
        raise corrupt(file.path, "it does not begin like a file that torch.save or lastgood writes")
    storages = _Storages(rules)
    magic, position = walk_pickle(window, 0, rules, storages.claim)
    version, position = walk_pickle(window, position, rules, storages.claim)
    if (magic, version) != (_MAGIC, _PROTOCOL_VERSION):
        raise corrupt(file.path, "it does not begin like a file that torch.save or lastgood writes")
    _, position = walk_pickle(window, position, rules, storages.claim)
    _, position = walk_pickle(window, position, rules, storages.claim)
    keys, position = walk_pickle(window, position, rules, storages.claim)
    if not isinstance(keys, ListSymbol) or not all(type(key) is str for key in keys.items):
        rules.broken("no list of storages at its end")
    return storages.named, keys.items, position
