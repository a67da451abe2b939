"""The manifest: names, encoding, and what is not taken for one."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastgood.format.manifest import (
    InvalidManifestError,
    Manifest,
    ManifestFile,
    checkpoint_file,
    decode_manifest,
    encode_manifest,
    manifest_file,
)
from lastgood.format.spec import crc32


def manifest_of(world_size: int, *, version: int = 1) -> Manifest:
    files = [
        ManifestFile(rank, f"checkpoint_{rank}.pt", 1000 + rank, 0xFFFFFFFF - rank, f"{rank:032x}")
        for rank in range(world_size)
    ]
    return Manifest(version, "ab" * 16, world_size, files)


def sealed(body: bytes) -> bytes:
    """Any body, with the right checksum in front."""
    return b'{"crc32":%d,"manifest":%s}\n' % (crc32(body), body)


def altered(**changes: object) -> bytes:
    body = json.loads(encode_manifest(manifest_of(2)))["manifest"]
    return sealed(msgspec.json.encode(body | changes))


def test_names() -> None:
    assert checkpoint_file("/run/step-7", 12) == "/run/step-7/checkpoint_12.pt"
    assert manifest_file("/run/step-7/") == "/run/step-7/manifest.json"


@given(st.integers(1, 40))
def test_what_was_encoded_is_decoded(world_size: int) -> None:
    manifest = manifest_of(world_size)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_it_is_json_with_a_checksum_of_its_own_that_anybody_can_check() -> None:
    data = encode_manifest(manifest_of(2))
    document = json.loads(data)
    assert list(document) == ["crc32", "manifest"]
    body = data[data.index(b'"manifest":') + len(b'"manifest":') : -2]
    assert crc32(body) == document["crc32"]
    assert document["manifest"]["files"][1]["name"] == "checkpoint_1.pt"


def test_every_flipped_bit_is_noticed() -> None:
    data = encode_manifest(manifest_of(3))
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(InvalidManifestError):
                decode_manifest(bytes(damaged))


def test_every_truncation_is_noticed() -> None:
    data = encode_manifest(manifest_of(3))
    for length in range(len(data)):
        with pytest.raises(InvalidManifestError):
            decode_manifest(data[:length])


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(InvalidManifestError):
        decode_manifest(data)


FILES = json.loads(encode_manifest(manifest_of(2)))["manifest"]["files"]


@pytest.mark.parametrize(
    "data",
    [
        altered(manifest_version=2),
        altered(world_size=3),
        altered(world_size=0, files=[]),
        altered(world_size=-1),
        altered(files=FILES[::-1]),
        altered(files=[FILES[0], FILES[0]]),
        altered(files=[FILES[0], FILES[1] | {"name": "../checkpoint_1.pt"}]),
        altered(files=[FILES[0], FILES[1] | {"name": "/etc/passwd"}]),
        altered(files=[FILES[0], FILES[1] | {"name": ".."}]),
        altered(files=[FILES[0], FILES[1] | {"name": ""}]),
        altered(files=[FILES[0], FILES[1] | {"size": -1}]),
        altered(files=[FILES[0], FILES[1] | {"size": "1001"}]),
        altered(files=[FILES[0], FILES[1] | {"more": 1}]),
        altered(more=1),
        sealed(b"[]"),
        sealed(b"[" * 100_000 + b"]" * 100_000),
        encode_manifest(manifest_of(2)) + b"\n",
        b" " + encode_manifest(manifest_of(2)),
        json.dumps(json.loads(encode_manifest(manifest_of(2)))).encode(),
    ],
    ids=str,
)
def test_what_no_writer_writes_is_refused_checksum_or_not(data: bytes) -> None:
    with pytest.raises(InvalidManifestError):
        decode_manifest(data)


def test_a_digit_that_was_changed_is_told_by_the_checksum() -> None:
    data = encode_manifest(manifest_of(2))
    assert data.count(b'"size":1000') == 1
    with pytest.raises(InvalidManifestError, match="checksum does not match"):
        decode_manifest(data.replace(b'"size":1000', b'"size":1001'))


def test_the_version_is_named() -> None:
    with pytest.raises(InvalidManifestError, match="its version is 2; this lastgood reads 1"):
        decode_manifest(encode_manifest(manifest_of(2, version=2)))
