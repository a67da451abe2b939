"""Reading plans against a model: executed on a file that is a bytes object, they fetch what was asked for."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.format import read_plan
from lastgood.format.image import Layout, plan_layout
from lastgood.format.read_plan import (
    BLOCK_SIZE,
    DIRECT_FROM,
    PIECE_SIZE,
    RUN_SIZE,
    DirectRead,
    Part,
    Read,
    Request,
    ScatterRead,
    WholeRead,
    plan_parts,
    plan_whole,
)

FACTOR = 1024
"""The sizes of the plan's rules are divided by this here, so that a model of the file is small."""

BLOCK = BLOCK_SIZE // FACTOR
PIECE = PIECE_SIZE // FACTOR
RUN = RUN_SIZE // FACTOR
DIRECT = DIRECT_FROM // FACTOR
GAP = 512
"""More than a header, which does not shrink with the rest."""


@pytest.fixture(autouse=True, scope="module")
def _small_sizes() -> Iterator[None]:
    names = ("BLOCK_SIZE", "PIECE_SIZE", "RUN_SIZE", "DIRECT_FROM")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(read_plan, name, getattr(read_plan, name) // FACTOR)
        patch.setattr(read_plan, "RUN_GAP", GAP)
        yield


def layout_of(sizes: list[int]) -> Layout:
    return plan_layout(sizes[0], 6, sizes[1:], 700)


_RANGES = ((0, 300), (BLOCK - 2, BLOCK + 2), (0, 3 * BLOCK), (0, 3 * PIECE))
SIZES = st.lists(st.one_of(*(st.integers(*ends) for ends in _RANGES)), min_size=1, max_size=8)


@st.composite
def requests_of(draw: st.DrawFn) -> tuple[Layout, list[Request], int]:
    """A layout, ranges of its records, and how much memory they need together (addresses count from 1)."""
    layout = layout_of(draw(SIZES))
    requests, address = [], 1
    for _ in range(draw(st.integers(0, 8))):
        record = draw(st.integers(0, len(layout.checked) - 1))
        size = layout.records[record].size
        near_blocks = st.sampled_from([at for at in range(0, size + BLOCK, BLOCK) if at <= size] + [size])
        start, end = sorted(draw(st.tuples(*[st.one_of(st.integers(0, size), near_blocks)] * 2)))
        requests.append(Request(record, start, end, address))
        address += end - start
    return layout, requests, address


def blocks(start: int, end: int) -> range:
    """The numbers of the blocks that a range of a record touches."""
    return range(start // BLOCK, -(-end // BLOCK))


def contents(size: int) -> bytes:
    """Bytes of which no piece is mistaken for another."""
    return b"".join(number.to_bytes(4, "little") for number in range(size // 4 + 1))[:size]


class Model:
    """A file and a memory in which every byte may be written once."""

    def __init__(self, layout: Layout, memory_size: int) -> None:
        self.layout = layout
        self.file = contents(layout.file_size)
        self.memory: list[int | None] = [None] * memory_size
        self.read: list[tuple[int, int]] = []

    def data(self, request: Request) -> bytes:
        base = self.layout.records[request.record].data_offset
        return self.file[base + request.start : base + request.end]

    def execute(self, reads: list[Read]) -> list[Part]:
        """Carry out the reads but for whole ones; returns the parts that were read."""
        parts = []
        for read in reads:
            self.read.append((read.offset, read.offset + read.size))
            assert 0 <= read.offset < read.offset + read.size <= self.layout.file_size
            if isinstance(read, DirectRead):
                assert read.size == read.part.end - read.part.start <= PIECE
                assert (read.part.copy_start, read.part.copy_end) == (read.part.start, read.part.end)
                parts.append(read.part)
            elif isinstance(read, ScatterRead):
                parts += read.parts
            for part in [read.part] if isinstance(read, DirectRead) else getattr(read, "parts", []):
                base = self.layout.records[part.record].data_offset
                assert read.offset <= base + part.start <= base + part.end <= read.offset + read.size
                self._copy(part, base)
        return parts

    def _copy(self, part: Part, base: int) -> None:
        assert part.start <= part.copy_start <= part.copy_end <= part.end
        if not part.address:
            return
        for number in range(part.copy_end - part.copy_start):
            assert self.memory[part.address + number] is None, "written twice"
            self.memory[part.address + number] = self.file[base + part.copy_start + number]

    def found(self, request: Request) -> bytes:
        wanted = self.memory[request.address : request.address + request.end - request.start]
        assert None not in wanted, "not all was read"
        return bytes(byte for byte in wanted if byte is not None)


@settings(max_examples=150)
@given(requests_of(), st.booleans())
def test_parts_are_fetched_exactly(case: tuple[Layout, list[Request], int], check: bool) -> None:
    layout, requests, memory_size = case
    model = Model(layout, memory_size)
    parts = model.execute(plan_parts(layout, requests, check=check))
    for request in requests:
        assert model.found(request) == model.data(request)
    asked = [(request.record, request.start, request.end) for request in requests if request.start < request.end]
    for part in parts:
        size = layout.records[part.record].size
        if check:
            # Whole blocks, so that their checksums can be compared, and no block that nobody asked for.
            assert part.start % BLOCK == 0
            assert part.end % BLOCK == 0 or part.end == size
    if check:
        covered = [(part.record, number) for part in parts for number in blocks(part.start, part.end)]
        assert set(covered) == {(record, number) for record, start, end in asked for number in blocks(start, end)}
    else:
        assert sum(part.end - part.start for part in parts) == sum(end - start for _, start, end in asked)
    assert all(end - start <= max(RUN, PIECE) for start, end in model.read)


@settings(max_examples=150)
@given(SIZES, st.sets(st.integers(0, 7)))
def test_a_whole_read_touches_every_byte_once(sizes: list[int], wanted: set[int]) -> None:
    layout = layout_of(sizes)
    addresses: dict[int, int] = {}
    memory_size = 1
    for record in sorted(wanted):
        if record < len(layout.checked):
            addresses[record] = memory_size
            memory_size += layout.records[record].size
    model = Model(layout, memory_size)
    reads = plan_whole(layout, addresses)
    parts = model.execute(reads)
    # One after the other, without a gap.
    assert model.read[0][0] == 0
    assert model.read[-1][1] == layout.file_size
    assert all(before[1] == after[0] for before, after in zip(model.read, model.read[1:], strict=False))
    # Every record either in whole blocks of its own, or among the small ones of one read.
    by_part: dict[int, int] = {}
    for part in parts:
        assert part.start % BLOCK == 0
        assert part.start == by_part.get(part.record, 0)
        by_part[part.record] = part.end
    small = [number for read in reads if isinstance(read, WholeRead) for number in range(read.first, read.last)]
    assert sorted([*by_part, *small]) == list(range(len(layout.records)))
    for record, end in by_part.items():
        assert end == layout.records[record].size
        if record in addresses:
            assert model.found(Request(record, 0, end, addresses[record])) == model.data(Request(record, 0, end, 0))
    for read in reads:
        if isinstance(read, WholeRead) and read.first < len(layout.records):
            assert read.offset == layout.outside_span(read.first)[0]
            for number in range(read.first, read.last):
                assert layout.records[number].data_end <= read.offset + read.size
                assert number >= len(layout.checked) or layout.records[number].size < DIRECT


def test_neighbours_are_read_together_and_distant_ones_are_not() -> None:
    layout = layout_of([100] + [40] * 20 + [3 * RUN] + [40] * 5)
    small = [Request(3 + number, 0, 40, 1 + 40 * number) for number in (*range(20), *range(21, 26))]
    reads = plan_parts(layout, small, check=True)
    assert [len(read.parts) for read in reads if isinstance(read, ScatterRead)] == [20, 5]
    assert sum(read.size for read in reads) < 25 * 200


def test_nothing_asked_for_is_nothing_read() -> None:
    layout = layout_of([100, 50])
    assert plan_parts(layout, [], check=True) == []
    assert plan_parts(layout, [Request(3, 10, 10, 1)], check=True) == []
