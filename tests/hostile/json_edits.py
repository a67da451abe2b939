"""Changes of a JSON document that no writer makes: each member and item replaced by what it should never be."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from hypothesis import strategies as st

Path: TypeAlias = tuple[Any, ...]
Choose: TypeAlias = Callable[[Sequence[Any]], Any]
"""Takes one of several: by chance, or as hypothesis wants it."""

NUMBERS: list[Any] = [
    0,
    1,
    2,
    3,
    7,
    -1,
    -(2**31),
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
]
NUMBERS += [10**9, 10**12, 10**400, 0.5, 1e308, -0.0]
TEXTS: list[Any] = [
    "",
    "..",
    "/etc/passwd",
    "\0",
    "\x1b[2J",
    "\u202e",
    "[/]",
    "a\nb",
    "x" * 3000,
    "9" * 5000,
    "cpu:0:0",
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": None}, ["list", []], ["tensor"], ["reference", 0]]
DTYPES: list[Any] = ["float64", "int8", "bool", "complex128", "float8_e5m2", "untyped", "qint8", "load", "Tensor"]
PLACEMENTS: list[Any] = ["R", "S(0)", "S(1)", "S(99)", "_S(0, 64)", "_S(0, 2)", "_S(0, 999999999)", "P(sum)"]


_NESTED = re.compile(r'"<(\d+) (nodes|arrays)>"')


def paths_of(document: Any, path: Path = ()) -> Iterator[Path]:
    """Where each value of a document stands, the document itself included."""
    yield path
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield from paths_of(value, (*path, key))


def at(document: Any, path: Path) -> Any:
    """What stands at a path."""
    for key in path:
        document = document[key]
    return document


def put(document: Any, path: Path, value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    return changed


def nested(depth: int, form: str) -> str:
    """Stands for a document this deep, of nodes or of plain arrays; :func:`encoded` puts it there."""
    return f"<{depth} {form}>"


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """The document after one or two changes, as hypothesis chooses them."""
    return edit(document, lambda items: draw(st.sampled_from(items)))


def edit(document: Any, choose: Choose) -> Any:
    """The document after one or two changes, of kinds that tell most at numbers, texts and arrays."""
    for _ in range(choose([1, 2])):
        path = choose(list(paths_of(document)))
        document = put(document, path, _replacement(document, at(document, path), choose))
    return document


def _replacement(document: Any, now: Any, choose: Choose) -> Any:
    kinds = ["other", "other node"]
    if isinstance(now, int | float) and not isinstance(now, bool):
        kinds += ["number"] * 6
    elif isinstance(now, str):
        kinds += ["text"] * 4
    elif isinstance(now, list | dict):
        kinds += ["fewer", "more", "many", "swapped", "nested", "numbers"]
    kind = choose(kinds)
    if kind == "number":
        near = [now - 1, now + 1, -now, now * 2] if isinstance(now, int) else []
        return choose(NUMBERS + near)
    if kind == "text":
        return choose(TEXTS + DTYPES + PLACEMENTS)
    if kind == "other node":
        return copy.deepcopy(at(document, choose(list(paths_of(document)))))
    if kind == "other":
        return choose(OTHERS + NUMBERS + TEXTS)
    if kind == "nested":
        return nested(choose([90, 101, 150, 900, 20_000]), choose(["nodes", "arrays"]))
    return _other_object(now, kind, choose) if isinstance(now, dict) else _other_array(now, kind, choose)


def _other_object(now: dict[str, Any], kind: str, choose: Choose) -> Any:
    keys = list(now)
    if kind == "swapped":
        return {key: now[key] for key in reversed(keys)}
    if kind in ("more", "many", "numbers") or not keys:
        return now | {choose([*TEXTS, "rank", "root"]): choose(OTHERS + NUMBERS)}
    gone = choose(keys)
    return {key: value for key, value in now.items() if key != gone}


def _other_array(now: list[Any], kind: str, choose: Choose) -> Any:
    if kind == "swapped":
        return now[::-1]
    if kind == "more":
        return [*now, choose([*OTHERS, *NUMBERS, *now])]
    if kind == "many":
        return now * choose([2, 10, 300, 3000])
    if kind == "numbers":
        return [choose(NUMBERS)] * choose([1, 2, len(now), 70, 1000, 5000])
    number = choose(range(len(now) or 1))
    return now[:number] + now[number + 1 :]


def encoded(document: Any) -> bytes:
    """As our writers write JSON: without spaces, text in UTF-8."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return _NESTED.sub(_written_out, text).encode("utf-8", "surrogatepass")


def _written_out(found: re.Match[str]) -> str:
    depth = int(found[1])
    begin, end = ('["list",[', "]]") if found[2] == "nodes" else ("[", "]")
    return begin * depth + "1" + end * depth
