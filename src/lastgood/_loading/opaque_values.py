"""Loading what only a pickle can describe: by torch's own restricted unpickler, from bytes that have been checked."""

import io
import pickle
import re
import zipfile
from typing import Any

import torch

from lastgood._loading.records import read_parts
from lastgood._loading.values import MapLocation
from lastgood._memory import address_of
from lastgood._torch_internals import untyped_storage_of
from lastgood.errors import UnsafeCheckpointError
from lastgood.format.archive import Archive, corrupt
from lastgood.format.image import FIRST_STORAGE, LIMIT_32
from lastgood.format.index import OpaqueNode
from lastgood.format.pickle_writer import PROTOCOL
from lastgood.format.read_plan import Request
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
    what they share and nothing else is read.
    """
    nodes = archive.opaque_nodes
    numbers = sorted({number for node in nodes for number in node.storages})
    data = _read_records(archive, [0, *(FIRST_STORAGE + number for number in numbers)], check=check)
    pickle_bytes = data[0]
    bodies = [bytes(pickle_bytes[node.start : node.start + node.length]) for node in nodes]
    references = [_storage_reference(number, archive.index.storages[number].nbytes) for number in numbers]
    parts = [PROTOCOL, pickle.EMPTY_LIST, pickle.MARK, *bodies, *references, pickle.APPENDS, pickle.STOP]
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as file:
        file.writestr(PICKLE_RECORD, b"".join(parts))
        file.writestr(VERSION_RECORD, TORCH_FORMAT_VERSION)
        file.writestr(BYTEORDER_RECORD, archive.index.byteorder)
        for number, storage_bytes in zip(numbers, data[1:], strict=True):
            with file.open(
                f"{STORAGE_RECORD_PREFIX}{number}", "w", force_zip64=len(storage_bytes) >= LIMIT_32
            ) as record:
                record.write(storage_bytes)
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


def safe_torch_load(file: Any, path: str, **arguments: Any) -> Any:
    """``torch.load(weights_only=True)``, with its failures as errors of ours that name ``path``."""
    try:
        return torch.load(file, weights_only=True, **arguments)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is not None:
            raise UnsafeCheckpointError(
                f"{path} names {refused[1]}, which is not on torch's list of what is safe to load; nothing of the file "
                f"was run. If you trust the file, allow it by torch.serialization.add_safe_globals([{refused[1]}]) and "
                "load again.",
                path=path,
            ) from error
        raise corrupt(path, f"its pickle cannot be read: {error}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError) as error:
        raise corrupt(path, f"torch.load could not read it: {error}") from error


def _read_records(archive: Archive, records: list[int], *, check: bool) -> list[memoryview]:
    buffers = [memoryview(bytearray(archive.layout.records[number].size)) for number in records]
    requests = [
        Request(number, 0, len(buffer), address_of(buffer)) for number, buffer in zip(records, buffers, strict=True)
    ]
    read_parts(archive, requests, check=check)
    return buffers


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
