"""Loading one file: whole or partly, into new tensors or into given ones, of ours or of torch's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lastgood import _events
from lastgood._loading.foreign import load_foreign, verify_foreign
from lastgood._loading.foreign_into import load_foreign_into
from lastgood._loading.merge import CheckKeys, Merge
from lastgood._loading.opaque_values import OpaqueValues, load_opaque_values
from lastgood._loading.pairs import Pairs, ask
from lastgood._loading.records import check_rest, open_in_time, read_parts, read_whole
from lastgood._loading.spread import OneFile, Source, SpreadTarget, WholeTensors, check_targets, read_spread
from lastgood._loading.storages import (
    MapLocation,
    StoragePool,
    byte_range,
    map_file,
    map_storages,
)
from lastgood._loading.targets import naming_undefined_targets
from lastgood._loading.values import ObjectTable, ValueBuilder, tensors_in
from lastgood._memory import bytes_at, paused_garbage_collection
from lastgood.errors import ConfigError, CorruptCheckpointError, StorageError, corrupt
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.index import InvalidIndexError
from lastgood.format.nodes import OpaqueNode, ShardedNode, TensorNode
from lastgood.format.stream import native_byteorder
from lastgood.storage.base import StoredFile


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
        archive = open_in_time(file)
        admit(archive)
        if archive is None:
            if target is not None:
                check = verify or verify_first
                return load_foreign_into(file, target, map_location, check=check, check_keys=check_keys)
            return load_foreign(file, map_location=map_location, mmap=mmap, check=verify, check_data=not mmap), []
        return load_archive(
            archive,
            target,
            map_location=map_location,
            mmap=mmap,
            verify=verify,
            verify_first=verify_first,
            check_keys=check_keys,
            verify_whole=verify_whole,
            source=OneFile(archive),
        )


def load_archive(
    archive: Archive,
    target: Any,
    *,
    map_location: MapLocation,
    mmap: bool,
    verify: bool,
    verify_first: bool,
    check_keys: CheckKeys | None,
    verify_whole: bool,
    source: Source,
) -> tuple[Any, list[str]]:
    """Like :func:`load_file`, from a file of ours that is open; ``source`` has the parts of spread tensors."""
    if archive.index.byteorder != native_byteorder():
        path = archive.file.path
        raise ConfigError(f"{path} was written on a {archive.index.byteorder}-endian machine", path=path)
    try:
        if verify_first:
            read_whole(archive, [])
        if mmap:
            return _map(archive, map_location), []
        if target is None:
            return _load_new(archive, source, map_location, check=verify, verify_first=verify_first), []
        return _load_into(
            archive,
            source,
            target,
            map_location,
            check=verify,
            check_keys=check_keys,
            verify_first=verify_first,
            verify_whole=verify_whole and not verify_first,
        )
    except InvalidIndexError as error:
        raise _impossible(archive, error) from error


def verify_file(file: StoredFile) -> None:
    """Check every byte of the file; raises :class:`~lastgood.errors.CorruptCheckpointError`."""
    archive = open_in_time(file)
    if archive is None:
        verify_foreign(file)
        return
    read_whole(archive, [])
    pool = StoragePool(archive.index.storages, "meta")
    ask(pool, archive.nodes)
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


def _load_new(archive: Archive, source: Source, map_location: MapLocation, *, check: bool, verify_first: bool) -> Any:
    root = archive.index.root
    table = ObjectTable(archive.nodes)
    nodes = list({id(node): node for node in tensors_in(root, table, set())}.values())
    spread = [node for node in nodes if isinstance(node, ShardedNode)]
    _check_first(archive, source, [], spread, wanted=verify_first)
    pool = StoragePool(archive.index.storages, map_location)
    opaque = _opaque_of(archive, archive.opaque_nodes, pool, map_location, check=check)
    requests = ask(pool, nodes)
    if check and not pool.without_data:
        read_whole(archive, requests, owner=pool)
    else:
        read_parts(archive, requests, check=False, owner=pool)
    pool.relocate()
    whole = WholeTensors(spread, map_location, source)
    if not pool.without_data:
        read_spread(whole.targets(), source, check=check)
    return ValueBuilder(table, pool.tensor, opaque, whole.tensor).build(root)


def _check_first(
    archive: Archive, source: Source, targets: list[SpreadTarget], fresh: list[ShardedNode], *, wanted: bool
) -> None:
    """For ``verify_first``: check the other files that will be read from, too."""
    if wanted and (targets or fresh):
        for other in source.archives_for(targets, fresh):
            if other is not archive:
                read_whole(other, [])


def _map(archive: Archive, map_location: MapLocation) -> Any:
    index = archive.index
    if any(isinstance(node, ShardedNode) for node in archive.nodes):
        raise ConfigError(
            f"{archive.file.path} holds parts of tensors that are spread over ranks, which cannot be mapped as whole "
            "ones; load it without mmap=True",
            path=archive.file.path,
        )
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
    source: Source,
    target: Any,
    map_location: MapLocation,
    *,
    check: bool,
    check_keys: CheckKeys | None,
    verify_first: bool,
    verify_whole: bool,
) -> tuple[Any, list[str]]:
    index = archive.index
    table = ObjectTable(archive.nodes)
    merge = Merge(table, archive.file.path, check_keys)
    merge.plan(target, index.root)
    check_targets(merge.spread, archive.file.path)
    fresh = [node for node in merge.fresh if not isinstance(node, ShardedNode)]
    spread = [node for node in merge.fresh if isinstance(node, ShardedNode)]
    _check_first(archive, source, merge.spread, spread, wanted=verify_first)
    pool = StoragePool(index.storages, map_location)
    wanted = [*fresh, *(node for _, _, node in merge.in_place)]
    opaque = _opaque_of(archive, wanted, pool, map_location, check=check)
    merge.check_opaque(opaque)
    requests = ask(pool, fresh)
    pairs = Pairs([(tensor, node) for _, tensor, node in merge.in_place])
    whole = WholeTensors(spread, map_location, source)
    with naming_undefined_targets(archive.file.path, [path for path, _, _ in (*merge.in_place, *merge.spread)]):
        read_parts(archive, [*requests, *pairs.requests()], check=check, owner=(pool, pairs))
        pairs.finish(archive, opaque, check=check)
        done = read_spread([*merge.spread, *whole.targets()], source, check=check)
        if verify_whole:
            done.setdefault(id(archive), set()).update(_wholly_read(archive, wanted))
            for each in source.verified_here():
                check_rest(each, done.get(id(each), ()) if check else ())
        pool.relocate()
        builder = ValueBuilder(table, pool.tensor, opaque, whole.tensor)
        return merge.carry_out(builder), merge.missing


def _wholly_read(archive: Archive, nodes: Sequence[TensorNode | OpaqueNode]) -> set[int]:
    """The records whose data is that of one of these tensors, from the first byte to the last."""
    records = archive.layout.records
    return {
        FIRST_STORAGE + node.storage
        for node in nodes
        if isinstance(node, TensorNode) and byte_range(node) == (0, records[FIRST_STORAGE + node.storage].size)
    }
