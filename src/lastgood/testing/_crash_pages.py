"""One file on a disk whose power may be cut: which bytes are there for certain, and which may be."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

PAGE_SIZE = 4096
"""What reaches a disk as one piece."""

_ZEROS = bytes(PAGE_SIZE)


class _Piece(NamedTuple):
    """Bytes given to one page, from ``start`` on."""

    start: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class _Page:
    """``bases``: what may be there whatever becomes of ``pending``; one alone, unless an fsync has failed."""

    def __init__(self, data: bytes) -> None:
        self.bases: tuple[bytes, ...] = (data.ljust(PAGE_SIZE, b"\0"),)
        self.pending: tuple[_Piece, ...] = ()
        self.latest = self.bases[0]

    def write(self, piece: _Piece) -> None:
        self.pending = (*self.pending, piece)
        self.latest = _overlaid(self.latest, (piece,))

    def sync(self, *, failed: bool) -> None:
        if failed:
            self.bases = tuple(self.possible())
        elif self.pending:
            self.bases = tuple(dict.fromkeys(_overlaid(base, self.pending) for base in self.bases))
        self.pending = ()

    def possible(self) -> list[bytes]:
        """Each of the pending pieces is there or not, and where they overlap, any one may have come last."""
        found = dict.fromkeys(self.bases)
        for base in self.bases:
            for count in range(1, len(self.pending) + 1):
                for chosen in itertools.combinations(self.pending, count):
                    for order in itertools.permutations(chosen) if _overlap(chosen) else (chosen,):
                        found[_overlaid(base, order)] = None
        return list(found)

    def drawn(self, rng: random.Random, likelihood: float) -> bytes:
        base = rng.choice(self.bases)
        chosen = [piece for piece in self.pending if rng.random() < likelihood]
        if rng.random() < 0.25:
            rng.shuffle(chosen)
        return _overlaid(base, chosen)


def _overlaid(base: bytes, pieces: Iterable[_Piece]) -> bytes:
    page = bytearray(base)
    for piece in pieces:
        page[piece.start : piece.end] = piece.data
    return bytes(page)


def _overlap(pieces: Sequence[_Piece]) -> bool:
    return any(
        first.start < second.end and second.start < first.end for first, second in itertools.combinations(pieces, 2)
    )


class FileOnDisk:
    """The bytes of one file, as far as they are certain."""

    def __init__(self, data: bytes) -> None:
        self._pages = {
            start // PAGE_SIZE: _Page(data[start : start + PAGE_SIZE]) for start in range(0, len(data), PAGE_SIZE)
        }
        self._length = len(data)
        self._lengths = [len(data)]
        self._lengths_after_failure: list[int] | None = None
        self._known: list[bytes] | None = None
        self._latest: bytes | None = data

    def write(self, offset: int, data: bytes) -> None:
        """Bytes that may be there from now on, each page's by themselves."""
        self._known = self._latest = None
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, PAGE_SIZE)
            piece = _Piece(start, data[done : done + PAGE_SIZE - start])
            self._page(number).write(piece)
            done += len(piece.data)
            # A file that grows may be found with any of the lengths that it has had on the way.
            self._set_length(max(self._length, offset + done))

    def resize(self, size: int) -> None:
        """Another length; what is cut off may still be seen if the file grows again before the next fsync."""
        self._known = self._latest = None
        for number, page in self._pages.items():
            start = max(0, size - number * PAGE_SIZE)
            if size < self._length and start < PAGE_SIZE:
                page.write(_Piece(start, _ZEROS[start:]))
        self._set_length(size)

    def sync(self, *, failed: bool) -> None:
        """What is there now is certain; after a failure, what may be there now may be there for ever."""
        self._known = self._latest = None
        for page in self._pages.values():
            page.sync(failed=failed)
        if failed:
            self._lengths_after_failure = list(self._lengths)
        else:
            self._lengths = self._lengths_after_failure or [self._length]

    def _page(self, number: int) -> _Page:
        if number not in self._pages:
            self._pages[number] = _Page(b"")
        return self._pages[number]

    def _set_length(self, length: int) -> None:
        if length != self._length:
            self._length = length
            self._lengths_after_failure = None
            if length not in self._lengths:
                self._lengths.append(length)

    def latest(self) -> bytes:
        """All that was given to it."""
        if self._latest is None:
            self._latest = _joined({number: page.latest for number, page in self._pages.items()}, self._length)
        return self._latest

    @property
    def _is_certain(self) -> bool:
        pages = self._pages.values()
        return len(self._lengths) == 1 and not any(page.pending or len(page.bases) > 1 for page in pages)

    def extremes(self) -> list[bytes]:
        """As if nothing since the last fsync were there, and as if all were."""
        first = {number: page.bases[0] for number, page in self._pages.items()}
        return list(dict.fromkeys((_joined(first, self._lengths[0]), self.latest())))

    def possible(self) -> list[bytes]:
        """Everything that may be found in it after a power cut."""
        if self._known is None and self._is_certain:
            self._known = [self.latest()]
        if self._known is None:
            options = {number: page.possible() for number, page in self._pages.items()}
            found = {
                _joined(dict(zip(options, pages, strict=True)), length): None
                for length in self._lengths
                for pages in itertools.product(*options.values())
            }
            self._known = list(found)
        return self._known

    def drawn(self, rng: random.Random, likelihood: float) -> bytes:
        """One of these."""
        if self._is_certain:
            return self.latest()
        length = self._length if rng.random() < likelihood else rng.choice(self._lengths)
        return _joined({number: page.drawn(rng, likelihood) for number, page in sorted(self._pages.items())}, length)


def _joined(pages: Mapping[int, bytes], length: int) -> bytes:
    return b"".join([pages.get(number, _ZEROS) for number in range(-(-length // PAGE_SIZE))])[:length]
