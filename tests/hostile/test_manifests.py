"""Manifests that no writer wrote: refused, or told from the files that they do not fit."""

import json
from collections.abc import Callable
from typing import Any
from zlib import crc32

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.json_edits import edited, encoded
from tests.hostile.samples import Reader, Sample, write

from lastgood.format.manifest import Manifest, encode_manifest

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
