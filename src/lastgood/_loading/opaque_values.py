"""Loading what only a pickle can describe: by torch's own restricted unpickler, from bytes that have been checked."""

import io
import pickle
import re
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from lastgood._loading.pickle_rules import PickleRules, storage_of
from lastgood._loading.pickle_symbols import StorageSymbol
from lastgood._loading.pickle_walk import IncompletePickleError, walk_pickle
from lastgood._loading.records import check_pickle, read_parts
from lastgood._loading.storages import MapLocation, is_meta, relocated
from lastgood._memory import address_of
from lastgood._torch_internals import untyped_storage_of
from lastgood.errors import UnsafeCheckpointError, corrupt
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE, LIMIT_32
from lastgood.format.index import InvalidIndexError
from lastgood.format.nodes import OpaqueNode
from lastgood.format.pickle_writer import PROTOCOL
from lastgood.format.read_plan import PIECE_SIZE, Request
from lastgood.format.spec import (
    BYTEORDER_RECORD,
    PICKLE_RECORD,
    STORAGE_RECORD_PREFIX,
    TORCH_FORMAT_VERSION,
    VERSION_RECORD,
)

_REFUSED = re.compile(
    r"(?:Unsupported global: GLOBAL|unsupported GLOBAL|unrecognized function|allowlisted via .* but got) ([^\s,]+)"
)
"""How torch's restricted unpickler says what it refuses."""


_CHECKING_SPARSE_TENSORS = threading.RLock()


_NOT_FILLED = re.compile(r"Can only (SETITEM|append|extend|build)", re.IGNORECASE)
"""How it says that it puts items into no class but a few."""


class OpaqueValues:
    """The opaque values of one archive, and the storages that they stand on."""

    def __init__(self, values: dict[int, Any], storages: dict[int, torch.UntypedStorage]) -> None:
        self._values = values
        self.storages = storages

    def value(self, node: OpaqueNode) -> Any:
        """The value of a node of the archive's index."""
        return self._values[id(node)]


def load_opaque_values(archive: Archive, map_location: MapLocation, *, check: bool) -> OpaqueValues:
    """All opaque values of an archive, through ``torch.load(weights_only=True)``.

    They are loaded from a small archive made of their bodies and the storages that these name, so that values keep
    what they share and nothing else is read; for a moment the data of these storages is in memory twice.
    """
    nodes = archive.opaque_nodes
    numbers = sorted({number for node in nodes for number in node.storages})
    pickle_bytes = _read_record(archive, 0, 0, archive.index.pickle_size, check=check)
    if check:
        check_pickle(archive, pickle_bytes)
    bodies = [bytes(pickle_bytes[node.start : node.start + node.length]) for node in nodes]
    references = [_storage_reference(number, archive.index.storages[number].nbytes) for number in numbers]
    parts = [PROTOCOL, pickle.EMPTY_LIST, pickle.MARK, *bodies, *references, pickle.APPENDS, pickle.STOP]
    small_pickle = b"".join(parts)
    sizes = {str(number): archive.index.storages[number].nbytes for number in numbers}
    refuse_unsafe(archive.file.path, archive.file.size, small_pickle, sizes.get)
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as file:
        file.writestr(PICKLE_RECORD, small_pickle)
        file.writestr(VERSION_RECORD, TORCH_FORMAT_VERSION)
        file.writestr(BYTEORDER_RECORD, archive.index.byteorder)
        for number in numbers:
            nbytes = archive.index.storages[number].nbytes
            with file.open(f"{STORAGE_RECORD_PREFIX}{number}", "w", force_zip64=nbytes >= LIMIT_32) as record:
                for start in range(0, nbytes, PIECE_SIZE):
                    end = min(start + PIECE_SIZE, nbytes)
                    record.write(_read_record(archive, FIRST_STORAGE + number, start, end, check=check))
    small.seek(0)
    loaded = safe_torch_load(small, archive.file.path, map_location=map_location)
    if not isinstance(loaded, list) or len(loaded) != len(nodes) + len(numbers):
        raise corrupt(archive.file.path, "the bodies of its opaque values are not whole")
    values = {id(node): value for node, value in zip(nodes, loaded, strict=False)}
    storages = {}
    for number, value in zip(numbers, loaded[len(nodes) :], strict=True):
        storage = untyped_storage_of(value)
        if storage is None:
            raise corrupt(archive.file.path, "the bodies of its opaque values are not whole")
        storages[number] = storage
    return OpaqueValues(values, storages)


def safe_torch_load(file: Any, path: str, *, map_location: MapLocation, **arguments: Any) -> Any:
    """``torch.load(weights_only=True)``, with its failures as errors of ours that name ``path``.

    What ``map_location`` raises, or torch where a device is missing, comes through as it is: no fault of the file's.
    """
    failures: list[Exception] = []

    def locate(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        try:
            return relocated(storage, location, map_location)
        except Exception as error:
            failures.append(error)
            raise

    try:
        # Unchecked, the indices of a sparse tensor could lead operations on it outside its memory. The switch is the
        # whole process's.
        with _CHECKING_SPARSE_TENSORS, torch.sparse.check_sparse_tensor_invariants(not is_meta(map_location)):  # type: ignore[no-untyped-call]
            where: Any = map_location if is_meta(map_location) else locate
            return torch.load(file, weights_only=True, map_location=where, **arguments)
    except Exception as error:
        if failures and isinstance(failures[0], InvalidIndexError):
            raise corrupt(path, f"it names {failures[0]}") from None
        if failures:
            raise failures[0] from None
        raise _torch_failure(error, path) from error


def _torch_failure(error: Exception, path: str) -> Exception:
    """What an exception from torch's loader means."""
    if isinstance(error, pickle.UnpicklingError):
        refused = _REFUSED.search(str(error))
        if refused is not None:
            return UnsafeCheckpointError(
                f"{path} names {refused[1]}, which is not on torch's list of what is safe to load; nothing of the file "
                f"was run. If you trust the file, allow it by torch.serialization.add_safe_globals([{refused[1]}]) and "
                "load again.",
                path=path,
            )
        if _NOT_FILLED.search(str(error)):
            return UnsafeCheckpointError(
                f"{path} holds a list or dict of a class of its own, which torch's safe loader never fills, whatever "
                "is allowed; nothing of the file was run. If you trust it, torch.load(weights_only=False) reads it.",
                path=path,
            )
        return corrupt(path, f"its pickle cannot be read: {error}")
    if isinstance(error, (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError)):
        return corrupt(path, f"torch.load could not read it: {error}")
    return error


def refuse_unsafe(path: str, file_size: int, data: bytes | bytearray, size_of: Callable[[str], int | None]) -> None:
    """Raise unless the pickle only makes values, on storages that are there; ``size_of`` knows their bytes by key."""
    rules = PickleRules(path, file_size)

    def claim(identity: tuple[Any, ...]) -> StorageSymbol:
        storage = storage_of(identity[1], identity[4]) if len(identity) == 5 and identity[0] == "storage" else None
        if storage is None or type(identity[2]) is not str:
            rules.broken("a reference to something that is not a storage")
        size = size_of(identity[2])
        if size is None or storage.nbytes > size:
            rules.broken(f"the storage {identity[2]!r}, which the file does not hold or not in full")
        return storage

    try:
        walk_pickle(data, 0, rules, claim)
    except IncompletePickleError:
        rules.broken("it has no end")


def _read_record(archive: Archive, record: int, start: int, end: int, *, check: bool) -> memoryview:
    buffer = memoryview(bytearray(end - start))
    read_parts(archive, [Request(record, start, end, address_of(buffer))], check=check, owner=buffer)
    return buffer


def _storage_reference(number: int, nbytes: int) -> bytes:
    """The pickle of a persistent id that yields the whole storage."""
    identity = ("storage", torch.UntypedStorage, str(number), "cpu", nbytes)
    return _body(identity) + pickle.BINPERSID


def _body(value: Any) -> bytes:
    # Fast mode writes no memo entries, which could collide with those of the bodies.
    output = io.BytesIO()
    pickler = pickle.Pickler(output, 2)
    pickler.fast = True
    pickler.dump(value)
    return output.getvalue()[2:-1]
