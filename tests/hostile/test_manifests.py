"""Manifests that no writer wrote: refused, or told from the files that they do not fit."""

import json
import math
import time
from collections.abc import Callable
from typing import Any
from zlib import crc32

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.json_edits import edited, encoded
from tests.hostile.samples import Reader, Sample, write

from lastgood.format.manifest import Manifest, encode_manifest
from lastgood.format.mesh import Layout, Mesh, Placement, whole
from lastgood.format.sharding import pieces_within

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]
EDITED = "manifests that no writer wrote"


def manifest_of(sample: Sample) -> Any:
    """The manifest as plain JSON, without its checksum."""
    return json.loads(sample.whole["manifest.json"])["manifest"]


def sealed(document: Any) -> bytes:
    """The manifest with its checksum, in its canonical form if it has one."""
    body = encoded(document)
    try:
        return encode_manifest(msgspec.json.decode(body, type=Manifest))
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return b'{"crc32":%d,"manifest":%s}\n' % (crc32(body), body)


def unsealed(sample: Sample, document: Any) -> bytes:
    """The manifest with the checksum that it had before it was changed."""
    seal = json.loads(sample.whole["manifest.json"])["crc32"]
    return b'{"crc32":%d,"manifest":%s}\n' % (seal, encoded(document))


def test_a_manifest_is_sealed_as_it_was(sample: GetSample) -> None:
    """Otherwise the tests below would be about something else."""
    found = sample("spread")
    assert sealed(manifest_of(found)) == unsealed(found, manifest_of(found)) == found.whole["manifest.json"]


@settings(max_examples=50)
@given(choice=st.data(), is_sealed=st.booleans())
def test_no_manifest_breaks_a_reader(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject, is_sealed: bool
) -> None:
    found = sample("spread")
    document = choice.draw(edited(manifest_of(found)))
    data = sealed(document) if is_sealed else unsealed(found, document)
    if data == found.whole["manifest.json"]:
        return
    write(found, "manifest.json", data)
    seen = reader.read(found)
    # The files say what the manifest has to say: nothing of it can be something else.
    assert seen.of("verify").error, seen
    for way in ("load", "load rank 1", "load elsewhere", "load in place", "load keys"):
        assert seen.of(way).error or seen.of(way).same, (way, seen)
    if not is_sealed:
        for way in ("load", "load rank 1", "load elsewhere", "inspect", "entry"):
            assert seen.of(way).error, (way, seen)
    count_cases(EDITED, 1)


def test_a_layout_may_not_cut_a_tensor_into_more_parts_than_can_be_worked_out_in_good_time(
    count_cases: CountCases,
) -> None:
    def layout(mesh_shape: tuple[int, ...], factor: int) -> Layout:
        mesh = Mesh(mesh_shape, None, tuple(range(math.prod(mesh_shape))))
        return Layout("w", 4, (2**40,), mesh, tuple(Placement(0, factor) for _ in mesh_shape))

    for mesh_shape, factor in (((4, 500), 1999), ((2,) * 9, 256), ((2, 2), 4096)):
        with pytest.raises(ValueError, match=r"very many parts|the placement"):
            layout(mesh_shape, factor)
    for mesh_shape, factor in (((2,) * 8, 255), ((16, 16), 256), ((2, 2, 64), 250)):
        allowed = layout(mesh_shape, factor)
        began = time.process_time()
        pieces = pieces_within(allowed, whole(allowed.shape))
        assert time.process_time() - began < 10
        assert sum(piece.box.element_count for piece in pieces) == 2**40
    count_cases("small files that claim much", 6)
