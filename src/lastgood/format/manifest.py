"""The names inside a checkpoint's directory, and the manifest: the commit record of several ranks."""

import itertools
import os
import re
from collections.abc import Collection
from typing import Annotated

import msgspec

from lastgood.format.mesh import Count, Layout, Mesh, check_mesh, parse_placement
from lastgood.format.spec import DTYPES, crc32

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_RANK_FILE = re.compile(r"checkpoint_(0|[1-9][0-9]{0,8})\.pt")
MAX_MANIFEST_SIZE = 256 * 1024 * 1024


def checkpoint_file(path: str, rank: int) -> str:
    """The name of a rank's file in the checkpoint at ``path``."""
    return os.path.join(path, f"checkpoint_{rank}.pt")


def rank_of(name: str) -> int | None:
    """The rank whose file has exactly this name; ``None`` for any other name."""
    match = _RANK_FILE.fullmatch(name)
    return int(match[1]) if match else None


def absent_ranks(world_size: int, there: Collection[int], most: int) -> list[int]:
    """The first ``most`` ranks, of so many, that are not there: a file may claim any number of them."""
    return list(itertools.islice((rank for rank in range(world_size) if rank not in there), most))


def manifest_file(path: str) -> str:
    """The name of the commit record of the checkpoint at ``path``."""
    return os.path.join(path, MANIFEST_NAME)


class ManifestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's file. ``trailer_crc`` is the CRC-32 of its trailer, which covers the checksums of all else in it."""

    rank: Annotated[int, msgspec.Meta(ge=0)]
    name: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    trailer_crc: Annotated[int, msgspec.Meta(ge=0)]
    save_id: str


class ShardedTensor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A tensor that is spread over ranks: its key path, and how; ``mesh`` numbers the manifest's meshes.

    With the rules of :mod:`lastgood.format.sharding` this says which file holds which part of it.
    """

    name: str
    dtype: str
    shape: tuple[Count, ...]
    mesh: Count
    placements: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All files of one checkpoint, by rank, and the tensors that are spread over them, by name.

    ``differing`` lists those groups of other values (see :func:`~lastgood.format.vote.group_of`) that are not the same
    on all ranks.
    """

    manifest_version: int
    save_id: str
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    files: list[ManifestFile]
    meshes: list[Mesh] = []
    tensors: list[ShardedTensor] = []
    differing: list[Count] = []

    def layout(self, tensor: ShardedTensor) -> Layout:
        """How one of the tensors is spread; raises ``ValueError`` if that cannot be."""
        if tensor.mesh >= len(self.meshes) or tensor.dtype not in DTYPES:
            raise ValueError(f"the tensor {tensor.name!r} of dtype {tensor.dtype} on mesh {tensor.mesh}")
        placements = tuple([parse_placement(text) for text in tensor.placements])
        return Layout(tensor.name, DTYPES[tensor.dtype].itemsize, tensor.shape, self.meshes[tensor.mesh], placements)


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    crc32: Annotated[int, msgspec.Meta(ge=0)]
    manifest: msgspec.Raw


class InvalidManifestError(ValueError):
    """Bytes that are no manifest, or a damaged one."""


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON with its own checksum in front."""
    body = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(crc32(body), msgspec.Raw(body))) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Read and check a manifest; raises :class:`InvalidManifestError`."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        if crc32(bytes(sealed.manifest)) != sealed.crc32:
            raise InvalidManifestError("its checksum does not match")
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifestError(str(error)) from error
    if data != encode_manifest(manifest):
        raise InvalidManifestError("it is not in its canonical form")
    if manifest.manifest_version != MANIFEST_VERSION:
        raise InvalidManifestError(
            f"its version is {manifest.manifest_version}; this lastgood reads {MANIFEST_VERSION}"
        )
    # The number first: a range is made only of as many ranks as there are files.
    ranks = [file.rank for file in manifest.files]
    if len(ranks) != manifest.world_size or ranks != list(range(len(ranks))):
        raise InvalidManifestError("its files are not one a rank")
    if any("/" in file.name or file.name in ("", ".", "..") for file in manifest.files):
        raise InvalidManifestError("it names a file outside its directory")
    _check_tensors(manifest)
    return manifest


def _check_tensors(manifest: Manifest) -> None:
    names = [tensor.name for tensor in manifest.tensors]
    if any(first >= second for first, second in itertools.pairwise(names)):
        raise InvalidManifestError("its tensors are not in the order of their names")
    try:
        for mesh in manifest.meshes:
            check_mesh(mesh)
        for tensor in manifest.tensors:
            manifest.layout(tensor)
    except ValueError as error:
        raise InvalidManifestError(str(error)) from error
    if any(rank >= manifest.world_size for mesh in manifest.meshes for rank in mesh.ranks):
        raise InvalidManifestError("a mesh of it has more ranks than there are files")
