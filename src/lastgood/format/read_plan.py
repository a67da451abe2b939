"""Which byte ranges of a file to read, in what pieces, and what to do with them. Nothing here reads anything."""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from lastgood.format.image import Layout
from lastgood.format.spec import BLOCK_SIZE

DIRECT_FROM = 256 * 1024
"""Ranges of at least this many bytes are read straight to where they belong, in pieces of their own."""

PIECE_SIZE = 8 * BLOCK_SIZE
RUN_SIZE = 4 * 1024 * 1024
"""Smaller ranges that lie near each other are read together, about this many bytes at a time."""

RUN_GAP = 64 * 1024
"""Ranges this near to each other are read together, with what lies between."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``end`` of a record are wanted in memory at ``address``."""

    record: int
    start: int
    end: int
    address: int


class Part(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a record that are read (whole blocks, if they are to be checked), and those of them to copy out."""

    record: int
    start: int
    end: int
    copy_start: int
    copy_end: int
    address: int


class DirectRead(msgspec.Struct, frozen=True, gc=False):
    """Read ``size`` bytes of the file at ``offset`` straight to the address of ``part``."""

    offset: int
    size: int
    part: Part


class ScatterRead(msgspec.Struct, frozen=True, gc=False):
    """Read ``size`` bytes of the file at ``offset`` into scratch memory and copy the parts out of it."""

    offset: int
    size: int
    parts: list[Part]


class WholeRead(msgspec.Struct, frozen=True, gc=False):
    """Read whole records, from ``first`` up to but not including ``last``, with what lies outside them.

    The bytes from ``offset`` on begin with what stands before the data of record ``first``. With ``last`` the number
    of records, they go on to the end of the file.
    """

    offset: int
    size: int
    first: int
    last: int


Read = DirectRead | ScatterRead | WholeRead


def plan_whole(layout: Layout, addresses: Mapping[int, int], done: Collection[int] = ()) -> list[Read]:
    """Reads that touch every byte of the file; ``addresses`` says where the data of which records is wanted.

    Of the records in ``done``, the data of large ones is left out.
    """
    reads: list[Read] = []
    records, checked = layout.records, len(layout.checked)
    first = offset = 0
    for number, record in enumerate(records):
        start, end = record.data_offset, record.data_end
        if end - start >= DIRECT_FROM and number < checked:
            # The bytes before its data are read with the small records before it; its data by itself.
            reads.append(WholeRead(offset, start - offset, first, number))
            if number not in done:
                reads += _read_large(number, start, end - start, addresses.get(number, 0))
            first, offset = number + 1, end
        elif end - offset >= RUN_SIZE:
            reads.append(WholeRead(offset, end - offset, first, number + 1))
            first, offset = number + 1, end
    reads.append(WholeRead(offset, layout.file_size - offset, first, len(records)))
    return reads


def _read_large(number: int, offset: int, size: int, address: int) -> list[Read]:
    pieces: list[Read] = []
    for start in range(0, size, PIECE_SIZE):
        end = min(start + PIECE_SIZE, size)
        part = Part(number, start, end, start, end, address and address + start)
        if address:
            pieces.append(DirectRead(offset + start, end - start, part))
        else:
            pieces.append(ScatterRead(offset + start, end - start, [part]))
    return pieces


def plan_parts(layout: Layout, requests: Sequence[Request], *, check: bool) -> list[Read]:
    """Reads that fetch just what is requested; with ``check``, rounded out to whole blocks."""
    plan = _PartsPlan(layout)
    for request in sorted(requests, key=lambda request: (request.record, request.start)):
        if request.start < request.end:
            plan.add(request, check=check)
    return plan.finish()


def _round_down(value: int) -> int:
    return value - value % BLOCK_SIZE


def _round_up(value: int) -> int:
    return value + -value % BLOCK_SIZE


class _PartsPlan:
    """Collects parts in file order and joins neighbours into one read."""

    def __init__(self, layout: Layout) -> None:
        self._records = layout.records
        self._reads: list[Read] = []
        self._parts: list[Part] = []
        self._start = self._end = 0

    def add(self, request: Request, *, check: bool) -> None:
        """Plan one request: whole blocks straight to their place if there are many, the rest through scratch."""
        start, end, size = request.start, request.end, self._records[request.record].size
        cover_start, cover_end = (_round_down(start), min(_round_up(end), size)) if check else (start, end)
        inner_start = _round_up(start) if check else start
        inner_end = _round_down(end) if check and end < size else end
        if inner_end - inner_start < DIRECT_FROM:
            self._scatter(request, cover_start, cover_end)
            return
        if cover_start < inner_start:
            self._scatter(request, cover_start, inner_start)
        self._flush()
        base = self._records[request.record].data_offset
        for piece_start in range(inner_start, inner_end, PIECE_SIZE):
            part = _part(request, piece_start, min(piece_start + PIECE_SIZE, inner_end))
            self._reads.append(DirectRead(base + piece_start, part.end - piece_start, part))
        if inner_end < cover_end:
            self._scatter(request, inner_end, cover_end)

    def finish(self) -> list[Read]:
        self._flush()
        return self._reads

    def _scatter(self, request: Request, start: int, end: int) -> None:
        base = self._records[request.record].data_offset
        for piece_start in range(start, end, RUN_SIZE):
            self._append(_part(request, piece_start, min(piece_start + RUN_SIZE, end)), base)

    def _append(self, part: Part, base: int) -> None:
        start, end = base + part.start, base + part.end
        near = self._start <= start <= self._end + RUN_GAP and end - self._start <= RUN_SIZE
        if self._parts and not near:
            self._flush()
        if not self._parts:
            self._start = self._end = start
        self._parts.append(part)
        self._end = max(self._end, end)

    def _flush(self) -> None:
        if self._parts:
            self._reads.append(ScatterRead(self._start, self._end - self._start, self._parts))
            self._parts = []


def _part(request: Request, start: int, end: int) -> Part:
    copy_start, copy_end = max(start, request.start), min(end, request.end)
    return Part(request.record, start, end, copy_start, copy_end, request.address + copy_start - request.start)
