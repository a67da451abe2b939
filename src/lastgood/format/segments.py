"""One dimension of a tensor, divided again and again: which of its indices are left to which rank."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from lastgood.format.mesh import Shape


class Segment(NamedTuple):
    """Indices of a dimension that lie together, from ``start`` on."""

    start: int
    size: int


Segments: TypeAlias = tuple[Segment, ...]


class Step(NamedTuple):
    """One division of a dimension, over the ranks along one dimension of the mesh."""

    parts: int
    split_factor: int


def _slices(segments: Segments, ranges: Iterable[tuple[int, int]]) -> Segments:
    """The indices at these ranges of positions, counted through all segments; the ranges are in order.

    One pass over both, however many there are: a file may claim very many of each.
    """
    found: list[Segment] = []
    number = position = 0
    for low, high in ranges:
        while low < high and number < len(segments):
            start, size = segments[number]
            if position + size <= low:
                number, position = number + 1, position + size
                continue
            begin, end = start + low - position, start + min(high - position, size)
            if found and sum(found[-1]) == begin:
                found[-1] = Segment(found[-1].start, end - found[-1].start)
            else:
                found.append(Segment(begin, end - begin))
            low += end - begin
    return tuple(found)


def _cuts(length: int, step: Step) -> Iterator[tuple[int, int, int]]:
    """For each part of the first cut: where it begins and ends, and how long the pieces are that it is divided into."""
    width = -(-length // step.split_factor)
    for number in range(step.split_factor):
        first, end = min(number * width, length), min((number + 1) * width, length)
        yield first, end, -(-(end - first) // step.parts)


def take(segments: Segments, step: Step, coordinate: int) -> Segments:
    """What one coordinate gets of these indices."""

    def ranges() -> Iterator[tuple[int, int]]:
        for first, end, width in _cuts(length_of(segments), step):
            low = min(first + coordinate * width, end)
            yield low, min(low + width, end)

    return _slices(segments, ranges())


def _coordinates_within(segments: Segments, step: Step, first: int, end: int) -> list[int]:
    """The coordinates that get any of the indices from ``first`` up to ``end``."""
    low, high = positions_within(segments, first, end)
    found: set[int] = set()
    for begin, stop, width in _cuts(length_of(segments), step):
        inner_low, inner_high = max(low, begin), min(high, stop)
        if inner_low < inner_high:
            found.update(range((inner_low - begin) // width, (inner_high - 1 - begin) // width + 1))
    return sorted(found)


def positions_within(segments: Segments, first: int, end: int) -> tuple[int, int]:
    """Which positions hold indices from ``first`` up to ``end``: they lie together, as the segments are in order."""
    low = high = position = 0
    is_first = True
    for start, size in segments:
        inner_low, inner_high = max(first, start), min(end, start + size)
        if inner_low < inner_high:
            if is_first:
                low, is_first = position + inner_low - start, False
            high = position + inner_high - start
        position += size
    return low, high


def length_of(segments: Segments) -> int:
    return sum(segment.size for segment in segments)


def _whole_dimension(size: int) -> Segments:
    return (Segment(0, size),) if size else ()


@functools.lru_cache(maxsize=8192)
def segments_of(size: int, steps: tuple[Step, ...], coordinates: Shape) -> Segments:
    segments = _whole_dimension(size)
    for step, coordinate in zip(steps, coordinates, strict=True):
        segments = take(segments, step, coordinate)
    return segments


@functools.lru_cache(maxsize=512)
def holders_within(size: int, steps: tuple[Step, ...], first: int, end: int) -> tuple[tuple[Shape, Segments], ...]:
    """The coordinates that hold any of the indices from ``first`` up to ``end``, with all that they hold."""
    found: list[tuple[Shape, Segments]] = [((), _whole_dimension(size))]
    for step in steps:
        found = [
            ((*coordinates, coordinate), take(segments, step, coordinate))
            for coordinates, segments in found
            for coordinate in _coordinates_within(segments, step, first, end)
        ]
    return tuple(found)
