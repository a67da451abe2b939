"""HTML put together so that a text can never become markup: what is not :class:`Html` is escaped."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_VOID = frozenset({"input"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *content: str, **attributes: str | int | float | None) -> Html:
    """An element. ``class_`` stands for ``class``, ``_`` in other names for ``-``; ``None`` leaves one out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{join(content)}</{name}>")


def join(content: Iterable[str]) -> Html:
    """Pieces one after the other."""
    return Html("".join(piece if isinstance(piece, Html) else escape(piece) for piece in content))


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number it is sorted by where that is not its text."""

    content: str
    order: float | None = None
    class_: str | None = None


Row = tuple[Cell | str, ...]


def table(columns: Sequence[str], rows: Sequence[Row], *, caption: str, numbers: Sequence[str] = ()) -> Html:
    """A table that can be sorted by any column; those in ``numbers`` stand to the right.

    A wide one scrolls by itself. Long ones are cut by the page's script until somebody asks for all of it.
    """
    to_the_right = [title in numbers for title in columns]
    head = tag(
        "tr",
        *(
            tag("th", title, scope="col", class_="number" if right else None)
            for title, right in zip(columns, to_the_right, strict=True)
        ),
    )
    body = [tag("tr", *(_cell(cell, right) for cell, right in zip(row, to_the_right, strict=True))) for row in rows]
    inside = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="sortable")
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(cell: Cell | str, right: bool) -> Html:
    if isinstance(cell, str):
        return tag("td", cell, class_="number" if right else None)
    classes = " ".join(name for name in ("number" if right else "", cell.class_ or "") if name)
    return tag("td", cell.content, class_=classes or None, data_order=cell.order)


def more(summary: str, *content: str) -> Html:
    """Something that is there when asked for."""
    return tag("details", tag("summary", summary), *content)


def bar(share: float | None) -> Html:
    """A bar as long as a share of its cell, from 0 to 1; a full one, marked, for what is no number."""
    class_ = "bar" if share is not None else "bar unbounded"
    width = 100.0 if share is None else round(100 * min(1.0, max(0.0, share)), 2)
    shape = tag("rect", width=width, height=8)
    return tag("svg", shape, class_=class_, viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")
