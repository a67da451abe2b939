"""The layout: where records stand, and headers and directory that describe them, at any size and number."""

import zipfile
import zlib
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.format.zip_layout import read_layout

from lastgood.format.image import Layout, data_descriptor, directory, local_header, plan_layout
from lastgood.format.spec import combine_crcs, crc32

GIB = 1024**3

sizes = st.one_of(
    st.integers(0, 300),
    st.sampled_from([65_535, 65_536, 65_537, 1024**2, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 5]),
    st.integers(0, 60 * GIB),
)


def write_without_data(layout: Layout, crcs: list[int], path: Path) -> None:
    """A file with everything but the records' data, which is left out as holes."""
    with path.open("wb") as file:
        for record, crc in zip(layout.records, crcs, strict=True):
            header = local_header(record)
            assert len(header) == record.data_offset - record.header_offset
            file.seek(record.header_offset)
            file.write(header)
            file.seek(record.data_end)
            file.write(data_descriptor(record, crc))
        assert file.tell() == layout.directory_offset
        file.write(directory(layout, crcs))
        assert file.tell() == layout.file_size


def check_as_zip(layout: Layout, crcs: list[int], path: Path) -> None:
    """Two readers of zip files find every record where the layout has it: one written here, and Python's."""
    write_without_data(layout, crcs, path)
    with path.open("rb") as file:
        found, directory_offset = read_layout(file)
    assert directory_offset == layout.directory_offset
    assert [(record.name, record.size, record.header_offset, record.data_offset) for record in found] == [
        (record.name, record.size, record.header_offset, record.data_offset) for record in layout.records
    ]
    assert [record.crc for record in found] == crcs
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    assert [(info.filename, info.file_size, info.header_offset, info.CRC) for info in infos] == [
        (record.name, record.size, record.header_offset, crc) for record, crc in zip(layout.records, crcs, strict=True)
    ]
    # One after the other, without a gap: what lies between two records is header and padding of the second.
    position = 0
    for record in found:
        assert record.header_offset == position
        assert record.data_offset % (4096 if record.size >= 65_536 else 64) == 0
        position = record.end
    assert position == directory_offset


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    pickle_size=st.integers(1, 10_000),
    storage_sizes=st.lists(sizes, max_size=12),
    index_size=st.integers(1, 100_000),
    some_crcs=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=18),
)
def test_every_record_is_found_where_the_layout_puts_it(
    tmp_path: Path, pickle_size: int, storage_sizes: list[int], index_size: int, some_crcs: list[int]
) -> None:
    layout = plan_layout(pickle_size, 6, storage_sizes, index_size)
    assert [record.size for record in layout.storages] == storage_sizes
    crcs = [some_crcs[number % len(some_crcs)] for number in range(len(layout.records))]
    check_as_zip(layout, crcs, tmp_path / "holes.zip")


def test_more_records_than_a_plain_zip_can_count(tmp_path: Path) -> None:
    layout = plan_layout(1000, 6, [0, 1, 64] * 24_000, 1000)
    assert len(layout.records) > 2**16
    check_as_zip(layout, list(range(len(layout.records))), tmp_path / "holes.zip")


def test_a_directory_that_begins_beyond_four_gigabytes(tmp_path: Path) -> None:
    layout = plan_layout(1000, 6, [4 * GIB, 10, 4 * GIB - 2], 1000)
    check_as_zip(layout, list(range(len(layout.records))), tmp_path / "holes.zip")
    assert layout.directory_offset > 8 * GIB


@given(
    sizes=st.lists(st.integers(0, 200_000), max_size=8),
    pickle_size=st.integers(1, 300_000),
    index_size=st.integers(1, 300_000),
)
def test_spans_outside_the_records_and_their_data_make_up_the_whole_file(
    sizes: list[int], pickle_size: int, index_size: int
) -> None:
    layout = plan_layout(pickle_size, 6, sizes, index_size)
    position = 0
    for number in range(len(layout.records) + 1):
        start, end = layout.outside_span(number)
        assert start == position
        assert start < end
        position = end + (layout.records[number].size if number < len(layout.records) else 0)
    assert position == layout.file_size


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_are_those_of_zip_files_and_join(first: bytes, second: bytes) -> None:
    expected = zlib.crc32(first + second)
    assert crc32(first + second) == expected
    assert crc32(second, crc32(first)) == expected
    assert combine_crcs(crc32(first), crc32(second), len(second)) == expected


def test_padding_stays_small() -> None:
    """Small tensors cost a header and at most 64 bytes each; a large one at most a page."""
    many = plan_layout(100, 6, [64] * 1000, 100)
    assert many.directory_offset < 1000 * (64 + 64 + 4 * 30) + 10_000
    for size in (65_536, 100_000):
        large = plan_layout(100, 6, [size] * 100, 100)
        assert large.file_size < 100 * size * 1.07
