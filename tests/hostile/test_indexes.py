"""Indexes that no writer wrote, every checksum right: refused, or loaded as what they say."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.archives import INDEX, PICKLE, contents_of, replaced, sealed, stored_in
from tests.hostile.json_edits import edited, encoded
from tests.hostile.reading import Reading
from tests.hostile.samples import Reader, Sample, write

from lastgood.format.index import InvalidIndexError, decode_index
from lastgood.format.pickle_writer import encode_pickle

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]
EDITED = "indexes that no writer wrote"
WAYS = ("load", "load in place", "load file", "map", "verify", "inspect", "entry", "command inspect as JSON")


def with_index(whole: bytes, document: Any, *, agreeing: bool) -> bytes:
    """A file with this index; ``agreeing``: with the pickle that follows from it and of the size that it says."""
    records = stored_in(whole)
    if not agreeing or not isinstance(document, dict):
        return sealed(replaced(records, {INDEX: encoded(document)}))
    pickled = contents_of(records, PICKLE)
    with contextlib.suppress(InvalidIndexError, ValueError, TypeError, OverflowError):  # there is none
        pickled = encode_pickle(decode_index(encoded(document | {"pickle_size": len(pickled)})), b"", [])
    document = document | {"pickle_size": len(pickled)}
    return sealed(replaced(records, {INDEX: encoded(document), PICKLE: pickled}))


def index_of(sample: Sample, name: str = "checkpoint_0.pt") -> Any:
    return json.loads(contents_of(stored_in(sample.whole[name]), INDEX))


def read_edited(reader: Reader, sample: Sample, name: str, data: bytes) -> Reading:
    """The ways of reading that differ most; what loads, every byte checked, is what ``verify`` calls whole."""
    write(sample, name, data)
    found = reader.read(sample, ways=WAYS)
    if not found.of("load").error:
        assert not found.of("verify").error, found
    return found


@settings(max_examples=50)
@given(choice=st.data(), agreeing=st.booleans())
def test_no_index_breaks_a_reader(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject, agreeing: bool
) -> None:
    found = sample("single")
    document = choice.draw(edited(index_of(found)))
    read_edited(
        reader, found, "checkpoint_0.pt", with_index(found.whole["checkpoint_0.pt"], document, agreeing=agreeing)
    )
    count_cases(EDITED, 1)


@settings(max_examples=30)
@given(choice=st.data(), name=st.sampled_from(["checkpoint_0.pt", "checkpoint_1.pt"]))
def test_no_index_of_spread_tensors_breaks_a_reader(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject, name: str
) -> None:
    found = sample("spread")
    document = choice.draw(edited(index_of(found, name)))
    write(found, name, with_index(found.whole[name], document, agreeing=True))
    reader.read(found, ways=("load", "load rank 1", "load elsewhere", "verify", "inspect", "entry", "command inspect"))
    count_cases(EDITED, 1)
