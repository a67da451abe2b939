"""Loading one file: whole or partly, into new tensors or into given ones, of ours or of torch's."""

from collections.abc import Callable
from typing import Any

import torch

from lastgood import _events
from lastgood._loading.foreign import load_foreign, verify_foreign
from lastgood._loading.merge import Merge
from lastgood._loading.opaque_values import OpaqueValues, load_opaque_values
from lastgood._loading.records import read_parts, read_whole, with_undefined_targets
from lastgood._loading.values import (
    MapLocation,
    ObjectTable,
    StoragePool,
    ValueBuilder,
    byte_range,
    copy_of,
    map_file,
    map_storages,
)
from lastgood._memory import paused_garbage_collection
from lastgood.capture import describe_loaded
from lastgood.errors import ConfigError, CorruptCheckpointError
from lastgood.format.archive import Archive, corrupt, open_archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import Index, OpaqueNode, TensorNode, element_span, walk_nodes
from lastgood.format.read_plan import Request
from lastgood.format.stream import native_byteorder
from lastgood.storage.base import StoredFile

STAGED_BYTES = 32 * 1024 * 1024
"""Tensors that cannot be read straight into their targets pass through memory in batches of about this size."""


def load_file(
    file: StoredFile,
    target: Any = None,
    *,
    map_location: MapLocation = None,
    mmap: bool = False,
    verify: bool = True,
    verify_first: bool = False,
    admit: Callable[[Archive], None] = lambda archive: None,
) -> tuple[Any, list[str]]:
    """What is in the file, and the key paths of ``target`` that are not.

    ``admit`` sees an archive of ours before anything of it is used, and may refuse it by raising.
    """
    if mmap and (target is not None or verify_first):
        raise ConfigError("mmap=True maps the file and reads nothing: it goes with neither a target nor verify_first")
    with _events.phase("read", file.path, nbytes=file.size), paused_garbage_collection():
        archive = open_archive(file)
        if archive is None:
            return _load_foreign(file, target, map_location, mmap=mmap, check=verify or verify_first)
        admit(archive)
        if archive.index.byteorder != native_byteorder():
            raise ConfigError(f"{file.path} was written on a {archive.index.byteorder}-endian machine", path=file.path)
        try:
            if verify_first:
                read_whole(archive, [])
            if mmap:
                return _map(archive, map_location), []
            if target is None:
                return _load_new(archive, map_location, check=verify), []
            return _load_into(archive, target, map_location, check=verify)
        except (ValueError, TypeError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise corrupt(file.path, f"its index describes what cannot be: {error}") from error


def verify_file(file: StoredFile) -> None:
    """Check every byte of the file; raises :class:`~lastgood.errors.CorruptCheckpointError`."""
    archive = open_archive(file)
    if archive is None:
        verify_foreign(file)
    else:
        read_whole(archive, [])


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
        read_whole(archive, requests)
    else:
        read_parts(archive, requests, check=False)
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
    mapped = map_file(archive.file.path, archive.file.size)
    map_storages(index, mapped, [record.data_offset for record in archive.layout.storages], pool, map_location)
    opaque = _opaque_of(archive, archive.opaque_nodes, pool, map_location, check=True)
    return ValueBuilder(ObjectTable(archive.nodes), pool.tensor, opaque).build(index.root)


def _load_into(archive: Archive, target: Any, map_location: MapLocation, *, check: bool) -> tuple[Any, list[str]]:
    index = archive.index
    table = ObjectTable(archive.nodes)
    merge = Merge(table, archive.file.path)
    merge.plan(target, index.root)
    pool = StoragePool(index.storages, map_location)
    wanted = [*merge.fresh, *(node for _, _, node in merge.in_place)]
    opaque = _opaque_of(archive, wanted, pool, map_location, check=check)
    merge.check_opaque(opaque)
    requests = _ask(pool, merge.fresh)
    direct: list[torch.Tensor] = []
    staged: list[tuple[torch.Tensor, TensorNode | OpaqueNode]] = []
    for _, tensor, node in merge.in_place:
        if isinstance(node, TensorNode) and can_read_into(tensor, node):
            start, end = byte_range(node)
            if start < end:
                requests.append(Request(FIRST_STORAGE + node.storage, start, end, tensor.data_ptr()))
                direct.append(tensor)
        else:
            staged.append((tensor, node))
    try:
        read_parts(archive, requests, check=check)
        _mark_changed(direct)
        _load_staged(archive, staged, opaque, check=check)
    except CorruptCheckpointError as error:
        raise with_undefined_targets(error, [path for path, _, _ in merge.in_place]) from error
    pool.relocate()
    return merge.carry_out(ValueBuilder(table, pool.tensor, opaque)), merge.missing


def can_read_into(target: torch.Tensor, node: TensorNode) -> bool:
    """Whether the saved bytes, as they are, are the target's bytes."""
    if target.device.type != "cpu" or target.layout is not torch.strided or target.is_conj() or target.is_neg():
        return False
    if "c" in node.flags or "n" in node.flags or type(target) not in (torch.Tensor, torch.nn.Parameter):
        return False
    stride = target.stride()
    if any(size > 1 and step != saved for size, step, saved in zip(node.shape, stride, node.stride, strict=True)):
        return False
    # Dense: a gap between the target's elements belongs to somebody else.
    return element_span(node.shape, node.stride) == target.numel()


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
            _copy(tensor, opaque(node))
            continue
        batch.append((tensor, node))
        start, end = byte_range(node)
        size += end - start
        if size >= STAGED_BYTES:
            _load_batch(archive, batch, check=check)
            batch, size = [], 0
    if batch:
        _load_batch(archive, batch, check=check)


def _load_batch(archive: Archive, batch: list[tuple[torch.Tensor, TensorNode]], *, check: bool) -> None:
    requests: list[Request] = []
    pools = []
    for _, node in batch:
        pool = StoragePool(archive.index.storages, "cpu")
        requests += _ask(pool, [node])
        pools.append(pool)
    read_parts(archive, requests, check=check)
    for (tensor, node), pool in zip(batch, pools, strict=True):
        _copy(tensor, pool.tensor(node))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _load_foreign(
    file: StoredFile, target: Any, map_location: MapLocation, *, mmap: bool, check: bool
) -> tuple[Any, list[str]]:
    if target is None:
        return load_foreign(file, map_location=map_location, mmap=mmap, check=check), []
    loaded = load_foreign(file, map_location="cpu", mmap=True, check=check)
    described = describe_loaded(loaded)
    index: Index = described.index
    table = ObjectTable([node for node, _ in walk_nodes(index.root)])
    merge = Merge(table, file.path)
    merge.plan(target, index.root)
    pool = StoragePool(index.storages, map_location)
    needed = {node.storage for node in merge.fresh if isinstance(node, TensorNode)}
    in_place = {node.storage for _, _, node in merge.in_place if isinstance(node, TensorNode)}
    for number in needed | in_place:
        storage = described.storages[number]
        pool.give(number, copy_of(storage) if number in needed else storage)
    merge.check_opaque(described.opaque)
    for _, tensor, node in merge.in_place:
        _copy(tensor, pool.tensor(node) if isinstance(node, TensorNode) else described.opaque(node))
    return merge.carry_out(ValueBuilder(table, pool.tensor, described.opaque)), merge.missing
