"""Fuzz target: decoding manifests, and working out from those that are accepted who holds which part.

The first byte of an input says what the others are: ``r`` a manifest, ``s`` one without its checksum.
"""

import contextlib
from zlib import crc32

import msgspec
from tests.hostile.fuzzing import instrumented, main

with instrumented():
    from lastgood.format.manifest import InvalidManifestError, Manifest, decode_manifest, encode_manifest
    from lastgood.format.mesh import whole
    from lastgood.format.sharding import held_pieces, pieces_within, written_pieces

MOST_ELEMENTS = 4096
"""Of a tensor whose parts are added up; larger ones are only divided."""


def sealed(body: bytes) -> bytes:
    """The manifest with its checksum, in its canonical form if it has one."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return encode_manifest(msgspec.json.decode(body, type=Manifest))
    return b'{"crc32":%d,"manifest":%s}\n' % (crc32(body), body)


def check(data: bytes) -> None:
    """A manifest is refused, or says of every element of every tensor in whose file it is, once."""
    form, content = data[:1], data[1:]
    stored = sealed(content) if form == b"s" else content
    try:
        manifest = decode_manifest(stored)
    except InvalidManifestError:
        return
    assert encode_manifest(manifest) == stored
    for tensor in manifest.tensors:
        layout = manifest.layout(tensor)
        region = whole(tensor.shape)
        pieces = pieces_within(layout, region)
        assert sum(piece.box.element_count for piece in pieces) == region.element_count
        for rank in layout.mesh.ranks[:4]:
            assert written_pieces(layout, rank) is not None
            held_pieces(layout, rank)


if __name__ == "__main__":
    main("manifest", check, json_form=b"s")
