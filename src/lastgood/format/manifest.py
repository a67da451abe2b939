"""The names inside a checkpoint's directory, and the manifest: the commit record of several ranks."""

import os
import re
from typing import Annotated

import msgspec

from lastgood.format.spec import crc32

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


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All files of one checkpoint, by rank."""

    manifest_version: int
    save_id: str
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    files: list[ManifestFile]


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
    if [file.rank for file in manifest.files] != list(range(manifest.world_size)):
        raise InvalidManifestError("its files are not one a rank")
    if any("/" in file.name or file.name in ("", ".", "..") for file in manifest.files):
        raise InvalidManifestError("it names a file outside its directory")
    return manifest
