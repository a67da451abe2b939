"""Records that are missing, doubled, in another order, on top of each other, or under names that lead elsewhere."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.archives import Stored, archive_of, stored_in, with_trailer_in_place
from tests.hostile.samples import Reader, Sample, write

GetSample = Callable[[str], Sample]
CountCases = Callable[[str, int], None]

NAMES = [
    b"",
    b"/",
    b"..",
    b"../checkpoint_0.pt",
    b"archive/../../etc/passwd",
    b"/etc/passwd",
    b"//etc/passwd",
    b"C:\\data.pkl",
    b"archive\\data.pkl",
    b"archive\\..\\data\\0",
    b"archive/data.pkl\0.txt",
    b"\0",
    b"archive/data\n/0",
    b"archive/\xff\xfe",
    b"\x80\x02cos\nsystem\n",
    b"archive/\xc3\xa9\xcc\x81",
    b"ARCHIVE/DATA.PKL",
    b"archive/data.pkl",
    b"archive/data/0",
    b"archive/data/00",
    b"archive/data/-1",
    b"archive/.lastgood/trailer",
    b"archive/.lastgood/index.json",
    b"checkpoint_0/data.pkl",
    b"checkpoint_0/data/0",
    b"other/data.pkl",
    b"archive/.format_version",
    b"a" * 65_535,
    b"archive/" + b"d/" * 20_000,
]
KINDS = ["drop", "double", "namesake", "namesake", "swap", "rename", "insert", "overlap", "hide", "list", "data"]
CHANGED = "files with records missing, doubled, moved, overlapping or under other names"


@st.composite
def changed(draw: st.DrawFn, records: list[Stored]) -> list[Stored]:
    """The records after one to three changes."""
    found = list(records)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        number = draw(st.integers(0, len(found) - 1))
        other = draw(st.integers(0, len(found) - 1))
        record = found[number]
        kind = draw(st.sampled_from(KINDS))
        if kind == "drop":
            del found[number]
        elif kind == "double":
            found.insert(other, record)
        elif kind == "namesake":
            name = draw(st.sampled_from([record.name, record.name.upper()]))
            found.insert(other, Stored(name, draw(st.sampled_from([found[other].data, b"\x80\x02K\x01."]))))
        elif kind == "swap":
            found[number], found[other] = found[other], found[number]
        elif kind == "rename":
            found[number] = record._replace(name=draw(st.sampled_from(NAMES)))
        elif kind == "insert":
            content = draw(st.sampled_from([b"", b"x", found[other].data, b"\x80\x02K\x01."]))
            found.insert(number, Stored(draw(st.sampled_from(NAMES)), content))
        elif kind == "overlap":
            found[number] = record._replace(at=other)
        elif kind == "hide":
            found[number] = record._replace(in_directory=False)
        elif kind == "list":
            found[number] = record._replace(in_file=False)
        else:
            found[number] = record._replace(data=found[other].data)
    return found


def test_archives_are_put_together_as_they_were(sample: GetSample) -> None:
    """Otherwise the tests below would be about something else."""
    for kind in ("single", "exotic"):
        whole = sample(kind).whole["checkpoint_0.pt"]
        assert archive_of(stored_in(whole)) == whole
        assert with_trailer_in_place(stored_in(whole)) == whole


@settings(max_examples=60)
@given(choice=st.data(), in_place=st.booleans())
def test_our_files_have_just_the_records_that_they_had(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject, in_place: bool
) -> None:
    found = sample("single")
    whole = found.whole["checkpoint_0.pt"]
    records = choice.draw(changed(stored_in(whole)))
    data = with_trailer_in_place(records) if in_place else archive_of(records)
    if data == whole:
        return
    write(found, "checkpoint_0.pt", data)
    seen = reader.read(found, ways=("load", "load file", "verify", "inspect", "entry", "load keys"))
    for way in ("load", "load file", "verify"):
        assert seen.of(way).error, (way, records, seen)
    for way in ("inspect", "load keys"):
        assert seen.of(way).error or seen.of(way).same, (way, records, seen)
    count_cases(CHANGED, 1)


@settings(max_examples=50)
@given(choice=st.data())
def test_files_of_torchs_hold_what_they_held_or_are_refused(
    reader: Reader, sample: GetSample, count_cases: CountCases, choice: st.DataObject
) -> None:
    found = sample("torch zip")
    whole = stored_in(found.whole["checkpoint_0.pt"])
    records = choice.draw(changed(whole))
    write(found, "checkpoint_0.pt", archive_of(records))
    seen = reader.read(found, ways=("load", "load keys", "load unverified", "verify", "inspect", "command inspect"))
    for way in ("load", "load keys", "inspect") if _hold_the_same(records, whole) else ():
        assert seen.of(way).error or seen.of(way).same, (way, records, seen)
    count_cases(CHANGED, 1)


def _hold_the_same(records: list[Stored], others: list[Stored]) -> bool:
    """Whether what a load needs is in both, under the same names, to whoever looks them up in the directory."""
    ours, theirs = ({record.name: record.data for record in each} for each in (records, others))
    needed = [name for name in theirs if b"/data" in name]
    return all(ours.get(name) == theirs[name] for name in needed)
