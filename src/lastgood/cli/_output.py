"""What all verbs say goes through here: text and tables for people, or one JSON document for scripts.

Colours are for terminals alone (and not where ``NO_COLOR`` is set). Lines are never wrapped, so that a path can be
copied and ``grep`` finds it. Names from disk may hold anything: what a terminal would obey is shown, not sent.
"""

import sys
import time
from collections.abc import Collection, Sequence
from typing import IO, Annotated, Any, TypeAlias

import msgspec
import typer

_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Answer with one JSON document, for scripts.")]
"""The option that every verb has: ``as_json: AsJson = False``."""


class Output:
    """Standard output of a verb, for a person or, with ``as_json``, for a script.

    A verb may call everything: for a person :meth:`json` does nothing, for a script :meth:`print` and :meth:`table`
    do nothing.
    """

    def __init__(self, as_json: bool = False, *, file: IO[str] | None = None) -> None:
        self.as_json = as_json
        self._file = sys.stdout if file is None else file

    @property
    def is_terminal(self) -> bool:
        """Whether a person is looking, and not another program."""
        return self._file.isatty()

    def print(self, text: str = "", *, style: str | None = None) -> None:
        """A line, or several; ``style`` is one of rich's, such as ``"bold red"``."""
        if not self.as_json:
            self._write([(text, style)])

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Collection[str] = (),
        styles: Sequence[str | None] = (),
    ) -> None:
        """Columns as wide as what is in them, those named in ``right`` aligned to the right.

        A column in which no row has anything is left out. ``styles`` has one for each row, if any.
        """
        if self.as_json:
            return
        kept = [number for number in range(len(columns)) if not rows or any(row[number] for row in rows)]
        cells = [[printable(row[number]).replace("\n", " ") for number in kept] for row in (columns, *rows)]
        widths = [max(_width(row[place]) for row in cells) for place in range(len(kept))]
        to_the_right = [columns[number] in right for number in kept]
        lines = [_aligned(row, widths, to_the_right) for row in cells]
        self._write(list(zip(lines, ["bold", *(styles or [None] * len(rows))], strict=True)))

    def json(self, value: Any) -> None:
        """The one document of a script's answer. Numbers that are not finite become ``null``."""
        if not self.as_json:
            return
        try:
            document = msgspec.json.encode(value)
        except UnicodeEncodeError:  # a file's name that is not UTF-8
            document = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
        if self.is_terminal:
            document = msgspec.json.format(document, indent=2)
        self._file.write(document.decode() + "\n")

    def _write(self, lines: Sequence[tuple[str, str | None]]) -> None:
        if not self.is_terminal:
            self._file.writelines(printable(line) + "\n" for line, _ in lines)
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=self._file, highlight=False)
        for line, style in lines:
            if style is None:
                self._file.write(printable(line) + "\n")
            else:
                console.print(Text(printable(line), style), soft_wrap=True)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, in the notation of Python; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def human_bytes(count: int) -> str:
    """A size as people say it: ``512 bytes``, ``1.5 GiB``."""
    size, unit = float(count), 0
    while abs(size) >= 1023.95 and unit + 1 < len(_BYTE_UNITS):
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return "1 byte" if count == 1 else f"{count} bytes"
    return f"{size:.1f} {_BYTE_UNITS[unit]}"


def human_time(seconds: float) -> str:
    """A length of time as people say it: ``12 ms``, ``0.84 s``, ``3 min``, ``5 h``, ``2 days``."""
    if seconds < 0:
        return f"-{human_time(-seconds)}"
    if seconds < 0.0995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 100 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        return f"{seconds / _HOUR:.0f} h"
    return f"{seconds / _DAY:.0f} days"


def human_age(moment: float, now: float) -> str:
    """How long ago a moment was, both in seconds since 1970: ``3 min ago``."""
    if moment > now + 1:
        return f"{human_time(moment - now)} in the future"
    return f"{human_time(round(max(0.0, now - moment)))} ago" if now - moment >= 1 else "just now"


def human_moment(moment: float) -> str:
    """A moment in seconds since 1970 as local date and time; ``?`` for one that no calendar has."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "?"


def _width(cell: str) -> int:
    if cell.isascii():
        return len(cell)
    from rich.cells import cell_len

    return cell_len(cell)


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = []
    for cell, width, to_the_right in zip(row, widths, right, strict=True):
        padding = " " * (width - _width(cell))
        cells.append(padding + cell if to_the_right else cell + padding)
    return "  ".join(cells).rstrip()


def _encodable(value: Any) -> Any:
    """The same with what is not Unicode in its strings written as Python writes it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list | tuple) else value
