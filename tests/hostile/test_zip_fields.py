"""Each field of each header at its limits: found in files of ours, found or without effect in files of torch's."""

import functools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.samples import Reader, Sample, write
from tests.hostile.zip_fields import Field, edits_of, resealed

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]

OURS = [("single", "checkpoint_0.pt"), ("exotic", "checkpoint_0.pt"), ("spread", "checkpoint_0.pt")]
OURS += [("spread", "checkpoint_1.pt")]
ENDS = ("trailer", "zip64 end", "zip64 locator", "end")
EDITED = "files with a header field at its limits"


@functools.lru_cache(maxsize=8)
def _edits(data: bytes) -> list[tuple[Field, int]]:
    return list(edits_of(data))


def whole_loads(sample: Sample, name: str) -> list[str]:
    """The loads that have to read, and to check, every byte of a file."""
    if sample.ranks == 1:
        return ["load", "load file"]
    return ["load elsewhere", "load rank 1" if name == "checkpoint_1.pt" else "load"]


def edited(sample: Sample, name: str, field: Field, value: int, *, sealed: bool) -> bytes:
    """The file with this field changed; with ``sealed``, all checksums are made right afterwards."""
    whole = sample.whole[name]
    data = field.replaced(whole, value)
    return resealed(data, whole) if sealed else data


def check_ours(reader: Reader, sample: Sample, name: str, data: bytes) -> None:
    """``verify`` and a whole load refuse this; what reads less refuses it, or sees what it would have seen."""
    write(sample, name, data)
    loads = whole_loads(sample, name)
    found = reader.read(sample, ways=(*loads, "verify", "inspect", "entry", "load keys"))
    for way in (*loads, "verify"):
        assert found.of(way).error, (way, found)
    for way in ("inspect", "entry", "load keys"):
        assert found.of(way).error or found.of(way).same, (way, found)


@settings(max_examples=80)
@given(choice=st.data(), which=st.sampled_from(OURS), where=st.sampled_from(["records", "ends"]), sealed=st.booleans())
def test_no_field_of_our_files_may_be_changed(
    reader: Reader,
    sample: GetSample,
    count_cases: CountCases,
    choice: st.DataObject,
    which: tuple[str, str],
    where: str,
    sealed: bool,
) -> None:
    """As many times in what reading begins with, at the end of the file, as in the many headers of records."""
    kind, name = which
    found = sample(kind)
    edits = [edit for edit in _edits(found.whole[name]) if (edit[0].owner in ENDS) == (where == "ends")]
    field, value = choice.draw(st.sampled_from(edits))
    data = edited(found, name, field, value, sealed=sealed)
    if data != found.whole[name]:  # sealing may have taken a wrong checksum back
        check_ours(reader, found, name, data)
        count_cases(EDITED, 1)


@settings(max_examples=40)
@given(choice=st.data())
def test_a_field_of_a_torch_file_is_found_changed_or_without_effect(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject
) -> None:
    found = sample("torch zip")
    field, value = choice.draw(st.sampled_from(_edits(found.whole["checkpoint_0.pt"])))
    check_theirs(reader, found, field, value)
    count_cases(EDITED, 1)


def check_theirs(reader: Reader, sample: Sample, field: Field, value: int) -> None:
    write(sample, "checkpoint_0.pt", field.replaced(sample.whole["checkpoint_0.pt"], value))
    found = reader.read(sample, ways=("load", "load keys", "verify", "inspect"))
    for way in ("load", "load keys", "inspect"):
        assert found.of(way).error or found.of(way).same, (way, found)


def test_every_byte_of_a_trailer_is_as_it_has_to_be(reader: Reader, sample: GetSample) -> None:
    found = sample("single")
    whole = found.whole["checkpoint_0.pt"]
    for field, value in edits_of(whole):
        if (field.owner, field.name) in (("trailer", "zero"), ("trailer", "version")):
            data = edited(found, "checkpoint_0.pt", field, value, sealed=True)
            check_ours(reader, found, "checkpoint_0.pt", data)


def test_what_torch_does_not_load_is_not_called_whole(reader: Reader, sample: GetSample) -> None:
    found = sample("torch zip")
    whole = found.whole["checkpoint_0.pt"]
    names = ("disk", "directory_disk", "disks", "count_here", "extra_size", "comment_size")
    edits = [(field, value) for field, value in edits_of(whole) if field.name in names and "local" not in field.owner]
    for field, value in edits[::5]:
        write(found, "checkpoint_0.pt", field.replaced(whole, value))
        seen = reader.read(found, ways=("load", "verify"))
        assert bool(seen.of("load").error) == bool(seen.of("verify").error), (field, value, seen)


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_every_field_at_every_limit_in_our_files(
    reader: Reader, sample: GetSample, count_cases: CountCases, rng_seed: int
) -> None:
    """All of the smallest file, and as many of the others', and with checksums made right, as there is time for."""
    chance = random.Random(rng_seed)
    for kind, name in OURS:
        found = sample(kind)
        edits = [(field, value, False) for field, value in _edits(found.whole[name])]
        if kind != "single":
            edits = chance.sample(edits, 250)
        edits += [(field, value, True) for field, value in chance.sample(_edits(found.whole[name]), 200)]
        for field, value, sealed in edits:
            data = edited(found, name, field, value, sealed=sealed)
            if data != found.whole[name]:
                check_ours(reader, found, name, data)
        count_cases(EDITED, len(edits))


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_very_many_fields_at_their_limits_in_a_torch_file(
    reader: Reader, sample: GetSample, count_cases: CountCases, rng_seed: int
) -> None:
    found = sample("torch zip")
    edits = random.Random(rng_seed).sample(_edits(found.whole["checkpoint_0.pt"]), 1000)
    for field, value in edits:
        check_theirs(reader, found, field, value)
    count_cases(EDITED, len(edits))
