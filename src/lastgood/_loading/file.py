"""Loading one file: whole or partly, into new tensors or into given ones, of ours or of torch's."""

from collections.abc import Callable
from typing import Any

import torch

from lastgood import _events
from lastgood._loading.foreign import load_foreign, verify_foreign
from lastgood._loading.foreign_into import load_foreign_into
from lastgood._loading.merge import CheckKeys, Merge
from lastgood._loading.opaque_values import OpaqueValues, load_opaque_values
from lastgood._loading.records import NO_PROGRESS_TIMEOUT_SECS, check_rest, no_data, read_parts, read_whole
from lastgood._loading.targets import copy_into, in_pieces, naming_undefined_targets, split_targets
from lastgood._loading.values import (
    MapLocation,
    ObjectTable,
    StoragePool,
    ValueBuilder,
    byte_range,
    map_file,
    map_storages,
)
from lastgood._memory import bytes_at, paused_garbage_collection
from lastgood._threads import call_with_timeout
from lastgood.errors import ConfigError, CorruptCheckpointError, StorageError, corrupt
from lastgood.format.archive import Archive, open_archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import InvalidIndexError, OpaqueNode, TensorNode
from lastgood.format.read_plan import Request
from lastgood.format.stream import native_byteorder
from lastgood.storage.base import StoredFile

STAGED_BYTES = 16 * 1024 * 1024
"""Tensors that cannot be read straight into their targets pass through memory in batches of at most this size."""


def load_file(
    file: StoredFile,
    target: Any = None,
    *,
    map_location: MapLocation = None,
    mmap: bool = False,
    verify: bool = True,
    verify_first: bool = False,
    admit: Callable[[Archive | None], None] = lambda archive: None,
    check_keys: CheckKeys | None = None,
    verify_whole: bool = False,
) -> tuple[Any, list[str]]:
    """What is in the file, and the key paths of ``target`` that are not.

    ``admit`` sees the archive (``None``: lastgood did not write the file) before anything of it is used, and may
    refuse it by raising; so may ``check_keys``, for a target, before anything is changed. ``verify_whole`` checks what
    the target does not ask for, too, after the rest.
    """
    if mmap and (target is not None or verify_first):
        raise ConfigError("mmap=True maps the file and reads nothing: it goes with neither a target nor verify_first")
    with _events.phase("read", file.path, nbytes=file.size), paused_garbage_collection():
        archive = call_with_timeout(
            lambda: open_archive(file), NO_PROGRESS_TIMEOUT_SECS, lambda: no_data(file.path), name="open"
        )
        admit(archive)
        if archive is None:
            if target is not None:
                check = verify or verify_first
                return load_foreign_into(file, target, map_location, check=check, check_keys=check_keys)
            return load_foreign(file, map_location=map_location, mmap=mmap, check=verify, check_data=not mmap), []
        if archive.index.byteorder != native_byteorder():
            raise ConfigError(f"{file.path} was written on a {archive.index.byteorder}-endian machine", path=file.path)
        try:
            if verify_first:
                read_whole(archive, [])
            if mmap:
                return _map(archive, map_location), []
            if target is None:
                return _load_new(archive, map_location, check=verify), []
            rest = verify_whole and not verify_first
            return _load_into(archive, target, map_location, check=verify, check_keys=check_keys, verify_whole=rest)
        except InvalidIndexError as error:
            raise _impossible(archive, error) from error


def verify_file(file: StoredFile) -> None:
    """Check every byte of the file; raises :class:`~lastgood.errors.CorruptCheckpointError`."""
    archive = open_archive(file)
    if archive is None:
        verify_foreign(file)
        return
    read_whole(archive, [])
    pool = StoragePool(archive.index.storages, "meta")
    _ask(pool, archive.nodes)
    try:
        ValueBuilder(ObjectTable(archive.nodes), pool.tensor, lambda node: None).build(archive.index.root)
    except InvalidIndexError as error:
        raise _impossible(archive, error) from error


def _impossible(archive: Archive, error: InvalidIndexError) -> CorruptCheckpointError:
    return corrupt(archive.file.path, f"its index describes what cannot be: {error}")


def _opaque_of(archive: Archive, nodes: list[Any], pool: StoragePool, map_location: MapLocation, *, check: bool) -> Any:
    """Loads the opaque values if any of ``nodes`` is one; what answers for them."""
    if not any(isinstance(node, OpaqueNode) for node in nodes):
        return _no_opaque
    opaque: OpaqueValues = load_opaque_values(archive, map_location, check=check)
    for number, storage in opaque.storages.items():
        pool.give(number, storage)
    return opaque.value


def _no_opaque(node: OpaqueNode) -> Any:
    raise ValueError("an opaque value where none was announced")


def _load_new(archive: Archive, map_location: MapLocation, *, check: bool) -> Any:
    root = archive.index.root
    pool = StoragePool(archive.index.storages, map_location)
    opaque = _opaque_of(archive, archive.opaque_nodes, pool, map_location, check=check)
    requests = _ask(pool, archive.nodes)
    if check and not pool.without_data:
        read_whole(archive, requests, owner=pool)
    else:
        read_parts(archive, requests, check=False, owner=pool)
    pool.relocate()
    return ValueBuilder(ObjectTable(archive.nodes), pool.tensor, opaque).build(root)


def _ask(pool: StoragePool, nodes: list[Any]) -> list[Request]:
    for node in nodes:
        if type(node) is TensorNode:
            pool.ask(node)
    return pool.allocate()


def _map(archive: Archive, map_location: MapLocation) -> Any:
    index = archive.index
    pool = StoragePool(index.storages, map_location)
    mapped = _map_same_file(archive)
    map_storages(index, mapped, [record.data_offset for record in archive.layout.storages], pool, map_location)
    opaque = _opaque_of(archive, archive.opaque_nodes, pool, map_location, check=True)
    return ValueBuilder(ObjectTable(archive.nodes), pool.tensor, opaque).build(index.root)


def _map_same_file(archive: Archive) -> torch.UntypedStorage:
    """The file under the archive's path, after making sure that it is still the one that was opened."""
    path, trailer = archive.file.path, archive.layout.trailer
    try:
        mapped = map_file(path, archive.file.size)
    except RuntimeError as error:
        raise StorageError(f"{path} cannot be mapped: {error}", path=path, phase="read") from error
    if bytes_at(mapped.data_ptr() + trailer.data_offset, trailer.size) != archive.trailer_bytes:
        raise StorageError(f"{path} was replaced while it was being opened; load it again.", path=path, phase="read")
    return mapped


def _load_into(
    archive: Archive,
    target: Any,
    map_location: MapLocation,
    *,
    check: bool,
    check_keys: CheckKeys | None,
    verify_whole: bool,
) -> tuple[Any, list[str]]:
    index = archive.index
    table = ObjectTable(archive.nodes)
    merge = Merge(table, archive.file.path, check_keys)
    merge.plan(target, index.root)
    pool = StoragePool(index.storages, map_location)
    wanted = [*merge.fresh, *(node for _, _, node in merge.in_place)]
    opaque = _opaque_of(archive, wanted, pool, map_location, check=check)
    merge.check_opaque(opaque)
    requests = _ask(pool, merge.fresh)
    direct, staged = split_targets([(tensor, node) for _, tensor, node in merge.in_place])
    for tensor, node in direct:
        start, end = byte_range(node)
        requests.append(Request(FIRST_STORAGE + node.storage, start, end, tensor.data_ptr()))
    with naming_undefined_targets(archive.file.path, [path for path, _, _ in merge.in_place]):
        read_parts(archive, requests, check=check, owner=(pool, direct))
        _mark_changed([tensor for tensor, _ in direct])
        _load_staged(archive, staged, opaque, check=check)
        if verify_whole:
            check_rest(archive, _wholly_read(archive, wanted) if check else ())
        pool.relocate()
        return merge.carry_out(ValueBuilder(table, pool.tensor, opaque)), merge.missing


def _wholly_read(archive: Archive, nodes: list[TensorNode | OpaqueNode]) -> set[int]:
    """The records whose data is that of one of these tensors, from the first byte to the last."""
    records = archive.layout.records
    return {
        FIRST_STORAGE + node.storage
        for node in nodes
        if isinstance(node, TensorNode) and byte_range(node) == (0, records[FIRST_STORAGE + node.storage].size)
    }


def _mark_changed(tensors: list[torch.Tensor]) -> None:
    """Let autograd know, as an in-place operation would."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _load_staged(
    archive: Archive, staged: list[tuple[torch.Tensor, TensorNode | OpaqueNode]], opaque: Any, *, check: bool
) -> None:
    """Fill the targets that need a copy (on a device, of other strides) through batches of bounded size."""
    batch: list[tuple[torch.Tensor, TensorNode]] = []
    size = 0
    for tensor, node in staged:
        if isinstance(node, OpaqueNode):
            copy_into(tensor, opaque(node))
            continue
        for piece, piece_node in in_pieces(tensor, node, STAGED_BYTES):
            start, end = byte_range(piece_node)
            if size + end - start > STAGED_BYTES:
                _load_batch(archive, batch, check=check)
                batch, size = [], 0
            batch.append((piece, piece_node))
            size += end - start
    _load_batch(archive, batch, check=check)


def _load_batch(archive: Archive, batch: list[tuple[torch.Tensor, TensorNode]], *, check: bool) -> None:
    requests: list[Request] = []
    pools = []
    for _, node in batch:
        pool = StoragePool(archive.index.storages, "cpu")
        requests += _ask(pool, [node])
        pools.append(pool)
    read_parts(archive, requests, check=check, owner=pools)
    for (tensor, node), pool in zip(batch, pools, strict=True):
        copy_into(tensor, pool.tensor(node))
