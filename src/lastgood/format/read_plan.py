"""Which byte ranges of a file to read, in what pieces, and what to do with them. Nothing here reads anything."""

from collections.abc import Sequence

import msgspec

from lastgood.format.image import Layout
from lastgood.format.spec import BLOCK_SIZE

DIRECT_FROM = 256 * 1024
"""Ranges of at least this many bytes are read straight to where they belong, in pieces of their own."""

PIECE_SIZE = 8 * BLOCK_SIZE
RUN_SIZE = 4 * 1024 * 1024
"""Smaller ranges that lie near each other are read together, up to this many bytes at a time."""

RUN_GAP = 64 * 1024
"""Ranges this near to each other are read together, with what lies between."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """Bytes ``start`` to ``end`` of a record are wanted in memory at ``address`` (0: nowhere, only checked)."""

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


class Outside(msgspec.Struct, frozen=True, gc=False):
    """The bytes before record ``number`` (past the last one: up to the end of the file), to be compared."""

    number: int
    start: int
    end: int


class Run(msgspec.Struct, frozen=True, gc=False):
    """One read. ``direct``: straight into the address of its only part; otherwise through a scratch buffer."""

    offset: int
    size: int
    parts: list[Part | Outside]
    direct: bool


def plan_whole(layout: Layout, requests: Sequence[Request]) -> list[Run]:
    """Runs that touch every byte of the file. At most one request a record."""
    by_record = {request.record: request for request in requests}
    runs = _Runs(layout)
    checked = len(layout.checked)
    for number, record in enumerate(layout.records):
        runs.outside(number)
        if number < checked:
            whole = Request(number, 0, record.size, 0)
            request = by_record.get(number, whole)
            if (request.start, request.end) != (0, record.size):
                _add_request(runs, whole, record.size, check=True)
            _add_request(runs, request, record.size, check=True)
    runs.outside(len(layout.records))
    return runs.finish()


def plan_parts(layout: Layout, requests: Sequence[Request], *, check: bool) -> list[Run]:
    """Runs that fetch just what is requested; with ``check``, rounded out to whole blocks."""
    runs = _Runs(layout)
    for request in sorted(requests, key=lambda request: (request.record, request.start)):
        _add_request(runs, request, layout.records[request.record].size, check=check)
    return runs.finish()


def _add_request(runs: "_Runs", request: Request, record_size: int, *, check: bool) -> None:
    start, end = request.start, request.end
    if start >= end:
        return
    cover_start, cover_end = start, end
    inner_start, inner_end = start, end
    if check:
        cover_start, cover_end = _round_down(start), min(_round_up(end), record_size)
        inner_start = min(_round_up(start), cover_end)
        inner_end = end if end == record_size else _round_down(end)
    if inner_end - inner_start < DIRECT_FROM or not request.address:
        runs.scratch(request, cover_start, cover_end)
        return
    if cover_start < inner_start:
        runs.scratch(request, cover_start, inner_start)
    runs.direct(request, inner_start, inner_end)
    if inner_end < cover_end:
        runs.scratch(request, inner_end, cover_end)


def _round_down(value: int) -> int:
    return value - value % BLOCK_SIZE


def _round_up(value: int) -> int:
    return value + -value % BLOCK_SIZE


class _Runs:
    """Collects parts in file order and joins neighbours into runs."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._runs: list[Run] = []
        self._parts: list[Part | Outside] = []
        self._start = self._end = 0

    def outside(self, number: int) -> None:
        start, end = self._layout.outside_span(number)
        for piece_start in range(start, end, RUN_SIZE):
            piece_end = min(piece_start + RUN_SIZE, end)
            self._append(Outside(number, piece_start, piece_end), piece_start, piece_end)

    def scratch(self, request: Request, start: int, end: int) -> None:
        base = self._layout.records[request.record].data_offset
        for piece_start in range(start, end, RUN_SIZE):
            piece_end = min(piece_start + RUN_SIZE, end)
            self._append(_part(request, piece_start, piece_end), base + piece_start, base + piece_end)

    def direct(self, request: Request, start: int, end: int) -> None:
        self._flush()
        base = self._layout.records[request.record].data_offset
        for piece_start in range(start, end, PIECE_SIZE):
            piece_end = min(piece_start + PIECE_SIZE, end)
            part = _part(request, piece_start, piece_end)
            self._runs.append(Run(base + piece_start, piece_end - piece_start, [part], True))

    def finish(self) -> list[Run]:
        self._flush()
        return self._runs

    def _append(self, part: Part | Outside, start: int, end: int) -> None:
        near = self._start <= start <= self._end + RUN_GAP
        if self._parts and not (near and max(end, self._end) - self._start <= RUN_SIZE):
            self._flush()
        if not self._parts:
            self._start = start
            self._end = end
        self._parts.append(part)
        self._end = max(self._end, end)

    def _flush(self) -> None:
        if self._parts:
            self._runs.append(Run(self._start, self._end - self._start, self._parts, False))
            self._parts = []


def _part(request: Request, start: int, end: int) -> Part:
    copy_start, copy_end = max(start, request.start), min(end, request.end)
    address = request.address and request.address + copy_start - request.start
    return Part(request.record, start, end, copy_start, copy_end, address)
