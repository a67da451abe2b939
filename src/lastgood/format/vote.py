"""What a rank says of its file when it votes for a commit, and how the votes of all become the manifest.

A vote has the same small size whatever the state is. What is long stands in *tables*, each under the digest of its
bytes: what all ranks say alike is passed on once.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from lastgood.errors import CorruptCheckpointError, RankMismatchError, listed
from lastgood.format.archive import Archive
from lastgood.format.image import FIRST_STORAGE
from lastgood.format.manifest import MANIFEST_VERSION, Manifest, ManifestFile, ShardedTensor, checkpoint_file
from lastgood.format.mesh import Mesh, is_replica_mesh
from lastgood.format.nodes import (
    CONTAINERS,
    Node,
    OpaqueNode,
    ReferenceNode,
    ShardedNode,
    TensorNode,
    encode_node,
    sharded_nodes,
    walk_values,
)
from lastgood.format.spec import crc32

GROUPS = 256
"""Values that are in no sharded tensor are compared between ranks in so many groups."""

_Digest = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class Vote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's: its file is durable under its name.

    ``layouts`` are the digests of the tables of its sharded tensors, one a mesh; ``values`` has a checksum for each
    group of its other values; ``replicas`` is the digest of the table of checksums of what has to be the same on all
    ranks, or empty.
    """

    rank: int
    world_size: int
    save_id: str
    size: int
    trailer_crc: int
    layouts: list[_Digest]
    values: bytes
    replicas: str


class _LayoutTable(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The tensors on one mesh: name, dtype, shape, placements."""

    mesh: Mesh
    tensors: list[tuple[str, str, tuple[int, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Ballot:
    """An encoded vote, and the tables that it refers to by their digests."""

    vote: bytes
    tables: dict[str, bytes]


_encoder = msgspec.json.Encoder()
_layout_decoder = msgspec.json.Decoder(_LayoutTable)
_replica_decoder = msgspec.json.Decoder(dict[str, int])


def ballot_of(archive: Archive, save_id: str, replica_checksums: Sequence[int] = ()) -> Ballot:
    """The ballot for a file of the save ``save_id``.

    ``replica_checksums`` are the CRC-32s of the whole tensors that were declared to be the same on all ranks, in the
    order of their names.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for the file of another save.
    """
    index = archive.index
    if index.save_id != save_id or index.independent:
        raise not_of_this_save(archive.file.path, index.rank)
    tables: dict[str, bytes] = {}
    layouts = [_add(tables, table) for table in _layout_tables(archive)]
    replicas = _add(tables, dict(_replica_names(archive, replica_checksums))) if replica_checksums else ""
    vote = Vote(
        rank=index.rank,
        world_size=index.world_size,
        save_id=save_id,
        size=archive.file.size,
        trailer_crc=crc32(archive.trailer_bytes),
        layouts=layouts,
        values=_group_checksums(archive),
        replicas=replicas,
    )
    return Ballot(_encoder.encode(vote), tables)


def _add(tables: dict[str, bytes], table: Any) -> str:
    data = _encoder.encode(table)
    digest = hashlib.sha256(data).hexdigest()[:32]
    tables[digest] = data
    return digest


def _replica_names(archive: Archive, checksums: Sequence[int]) -> Iterator[tuple[str, int]]:
    meshes = archive.index.meshes
    names = [path for path, node in sharded_nodes(archive.index.root) if is_replica_mesh(meshes[node.mesh])]
    return zip(sorted(names), checksums, strict=True)


def _layout_tables(archive: Archive) -> Iterator[_LayoutTable]:
    by_mesh: dict[int, list[tuple[str, str, tuple[int, ...], tuple[str, ...]]]] = {}
    for path, node in sharded_nodes(archive.index.root):
        by_mesh.setdefault(node.mesh, []).append((path, node.dtype, node.shape, node.placements))
    for number, tensors in sorted(by_mesh.items()):
        yield _LayoutTable(archive.index.meshes[number], sorted(tensors))


# Values that are no sharded tensors: whether all ranks have the same


def group_of(path: str) -> int:
    """The group in which the value at a key path is compared."""
    return crc32(path.encode("utf-8", "surrogatepass")) % GROUPS


def _group_checksums(archive: Archive) -> bytes:
    """For each group the sum of the checksums of its values, four bytes each, least significant first.

    Equal values may have unequal checksums (what only a pickle describes has); unequal values hardly ever equal ones.
    """
    sums = [0] * GROUPS
    for path, node in walk_values(archive.index.root):
        if not isinstance(node, ShardedNode):
            key = path.encode("utf-8", "surrogatepass")
            sums[crc32(key) % GROUPS] += crc32(content_of(node, archive), crc32(key))
    packed = array("I", [total & 0xFFFFFFFF for total in sums])
    assert packed.itemsize == 4
    return packed.tobytes()


def content_of(node: Node, archive: Archive) -> bytes:
    """Equal for equal values of two files, and for no others; what only a pickle describes equals no other rank's."""
    if isinstance(node, TensorNode):
        crc = archive.record_crcs[FIRST_STORAGE + node.storage]
        return _encoder.encode((node.dtype, node.offset, node.shape, node.stride, node.flags, crc))
    if isinstance(node, OpaqueNode):
        return b"%d" % archive.index.rank
    if isinstance(node, ReferenceNode):
        # Not its number: parts of spread tensors are counted too, and each rank has other ones.
        return b"reference to " + archive.references.first_path(node).encode("utf-8", "surrogatepass")
    if isinstance(node, CONTAINERS):
        return b"%s of %d" % (type(node).__name__.encode(), len(node.items))
    return encode_node(node)


# The count


def tally(votes: Sequence[bytes], fetch: Callable[[str], bytes], save_id: str | None) -> Manifest:
    """The manifest of a save for which every rank has voted; ``fetch`` gives the table with a digest.

    ``save_id`` is that of all of them, or ``None`` for ranks that met at a barrier, each with a save id of its own.

    Raises :class:`~lastgood.errors.CorruptCheckpointError` for a vote of another save or rank,
    :class:`~lastgood.errors.RankMismatchError` where ranks of one mesh do not agree which tensors they share, or where
    tensors that should be the same on all ranks are not, naming them.
    """
    decoded = [msgspec.json.decode(vote, type=Vote) for vote in votes]
    for rank, vote in enumerate(decoded):
        expected = vote.save_id if save_id is None else save_id
        if (vote.rank, vote.world_size, vote.save_id) != (rank, len(votes), expected):
            raise not_of_this_save(checkpoint_file("", rank), rank)
    _compare_replicas(decoded, fetch)
    meshes, tensors = _join_layouts(decoded, fetch)
    files = [
        ManifestFile(vote.rank, checkpoint_file("", vote.rank), vote.size, vote.trailer_crc, vote.save_id)
        for vote in decoded
    ]
    return Manifest(
        MANIFEST_VERSION, decoded[0].save_id, len(votes), files, meshes, tensors, _differing_groups(decoded)
    )


def tables_of(votes: Sequence[bytes]) -> set[str]:
    """The digests of the tables that these votes refer to: of layouts, most often those of the save before, and of
    checksums, other ones in every save."""
    decoded = [msgspec.json.decode(vote, type=Vote) for vote in votes]
    return {digest for vote in decoded for digest in (*vote.layouts, vote.replicas) if digest}


def not_of_this_save(path: str, rank: int) -> CorruptCheckpointError:
    """The error for a file of another save, or of another rank, where this rank's should be."""
    return CorruptCheckpointError(
        f"{path} is not the file that rank {rank} wrote in this save; the checkpoint is not committed. Do all ranks "
        "save to the same directory, and no other job?",
        path=path,
        rank=rank,
        phase="commit",
    )


def _compare_replicas(votes: Sequence[Vote], fetch: Callable[[str], bytes]) -> None:
    digests = [vote.replicas for vote in votes]
    if len(set(digests)) == 1:
        return
    tables = {digest: _replica_decoder.decode(fetch(digest)) if digest else {} for digest in dict.fromkeys(digests)}
    expected = tables[digests[0]]
    for rank, digest in enumerate(digests):
        found = tables[digest]
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if differing:
            raise RankMismatchError(
                f"the tensors {listed(differing)} were declared to be the same on all ranks, and rank "
                f"{rank} holds others than rank 0; the checkpoint is not committed, earlier ones are untouched. "
                "Have the ranks drifted apart (a buffer that is not synchronised, a seed, an optimizer)? What differs "
                "by design must not be declared replicated.",
                rank=rank,
                tensor=differing[0],
                phase="commit",
            )


def _join_layouts(votes: Sequence[Vote], fetch: Callable[[str], bytes]) -> tuple[list[Mesh], list[ShardedTensor]]:
    voters: dict[str, list[int]] = {}
    for vote in votes:
        for digest in vote.layouts:
            voters.setdefault(digest, []).append(vote.rank)
    tables = {digest: _layout_decoder.decode(fetch(digest)) for digest in voters}
    meshes: list[Mesh] = []
    tensors: dict[str, ShardedTensor] = {}
    for digest, table in sorted(tables.items(), key=lambda item: (item[1].mesh.ranks, item[1].mesh.shape, item[0])):
        if sorted(table.mesh.ranks) != voters[digest]:
            raise _layouts_differ(table, voters[digest], [each for other, each in tables.items() if other != digest])
        for name, dtype, shape, placements in table.tensors:
            if name in tensors:
                raise RankMismatchError(
                    f"the tensor {name!r} is spread over two meshes; the checkpoint is not committed, earlier ones "
                    "are untouched. Give tensors that are not the same different keys.",
                    tensor=name,
                    phase="commit",
                )
            tensors[name] = ShardedTensor(name, dtype, shape, len(meshes), placements)
        meshes.append(table.mesh)
    return meshes, [tensors[name] for name in sorted(tensors)]


def _layouts_differ(table: _LayoutTable, voters: Sequence[int], others: Sequence[_LayoutTable]) -> RankMismatchError:
    strangers = sorted(set(table.mesh.ranks) ^ set(voters))
    mine = set(table.tensors)
    names = sorted({entry[0] for other in others if other.mesh == table.mesh for entry in mine ^ set(other.tensors)})
    what = f"they do not agree on {', '.join(map(repr, names[:5]))}" if names else "some did not save those on it"
    return RankMismatchError(
        f"the ranks of the mesh {table.mesh.shape} hold different sharded tensors: {what} (ranks {strangers[:16]}); "
        "the checkpoint is not committed, earlier ones are untouched. All ranks of a mesh have to save the same keys, "
        "with the same shapes and placements.",
        tensor=names[0] if names else None,
        rank=strangers[0] if strangers else None,
        phase="commit",
    )


def _differing_groups(votes: Sequence[Vote]) -> list[int]:
    distinct = {vote.values for vote in votes}
    if len(distinct) == 1:
        return []
    columns = [memoryview(values).cast("I") for values in distinct]
    return [group for group in range(GROUPS) if len({column[group] for column in columns}) > 1]
