"""The two sections of the page on what is inside checkpoints: what takes the space, and what moved."""

from lastgood.cli._output import human_bytes
from lastgood.cli._report.data import Movement, Space, TensorMove
from lastgood.cli._report.markup import Cell, Html, Row, bar, join, more, table, tag
from lastgood.cli._report.words import count_in_words, figure_in_words

_LARGEST = 50
_SEARCH_BOX = {"type": "search", "id": "map-search", "autocomplete": "off", "spellcheck": "false"}
_ABOVE_ALL = 1e308


def space(data: Space | None, problem: str | None) -> Html:
    """The map, its search box, and the largest tensors."""
    if data is None:
        return tag("p", problem or "No checkpoint is committed.", class_="empty")
    files = "" if data.files == 1 else f" in {data.files:,} files"
    summary = f"Step {data.step:,}: {count_in_words(data.tensors, 'tensor')}, {human_bytes(data.nbytes)}{files}."
    parts = [tag("p", summary, id="space-summary"), _map()]
    if data.joined:
        text = (
            f"The {data.joined:,} smallest tensors are taken together, group by group; the search does not see their "
            "names. `lastgood inspect` lists them all."
        )
        parts.append(tag("p", text, class_="note"))
    dtypes = [
        (total.dtype, Cell(f"{total.tensors:,}", total.tensors), Cell(human_bytes(total.nbytes), total.nbytes))
        for total in data.dtypes
    ]
    parts.append(table(["Dtype", "Tensors", "Bytes"], dtypes, caption="By dtype", numbers=["Tensors", "Bytes"]))
    parts.append(more(f"The {_LARGEST} largest tensors", _largest(data)))
    return join(parts)


def _map() -> Html:
    search = tag("label", "Find keys", tag("input", **_SEARCH_BOX))
    return join(
        [
            tag("div", search, tag("output", id="map-found", for_="map-search"), class_="controls needs-script"),
            tag("div", id="map-matches", class_="matches needs-script"),
            tag("nav", id="map-path", class_="needs-script", aria_label="Where the map is"),
            tag("div", id="map", class_="needs-script", role="group", aria_label="Map of keys by size"),
            tag("p", id="map-detail", class_="readout needs-script", aria_live="polite"),
            tag("noscript", tag("p", "The map needs scripts.", class_="note")),
        ]
    )


def _largest(data: Space) -> Html:
    nodes = data.nodes
    leaves = [place for place, kind in enumerate(nodes.kind) if kind == "t"]
    largest = sorted(leaves, key=lambda place: -nodes.nbytes[place])[:_LARGEST]
    rows = [
        (
            Cell(_path(data, place), class_="key"),
            nodes.dtype[place],
            nodes.shape[place],
            Cell(human_bytes(nodes.nbytes[place]), nodes.nbytes[place]),
            Cell(f"{nodes.nbytes[place] / (data.nbytes or 1):.1%}", nodes.nbytes[place]),
        )
        for place in largest
    ]
    columns = ["Key", "Dtype", "Shape", "Bytes", "Share"]
    return table(columns, rows, caption="The largest tensors", numbers=["Bytes", "Share"])


def _path(data: Space, place: int) -> str:
    names: list[str] = []
    while place > 0:
        names.insert(0, data.nodes.name[place])
        place = data.nodes.parent[place]
    return ".".join(names).replace(".[", "[")


def movement(data: Movement | None, problem: str | None) -> Html:
    """How far layers and tensors moved."""
    if data is None:
        return tag("p", problem or "There are not two committed checkpoints to compare.", class_="empty")
    moved = data.count - data.equal
    common = count_in_words(data.count, "common tensor")
    summary = (
        f"From step {data.step_a:,} to step {data.step_b:,}, {moved:,} of {common} changed. "
        "Relative change is the norm of the difference over the norm before."
    )
    parts = [tag("p", summary, id="movement-summary")]
    if data.layers:
        parts.append(_layers(data))
    if data.tensors:
        parts.append(more(_tensors_summary(data), _tensors(data)))
    for title, keys in (
        (f"only at step {data.step_a:,}", data.only_in_a),
        (f"only at step {data.step_b:,}", data.only_in_b),
        ("of another shape, dtype or kind", data.changed_kind),
        ("with another plain value", data.changed_values),
        ("that only a pickle describes, not compared", data.not_compared),
    ):
        if keys:
            listed = tag("ul", *(tag("li", key, class_="key") for key in keys))
            parts.append(more(f"{count_in_words(len(keys), 'key')} {title}", listed))
    return join(parts)


def _layers(data: Movement) -> Html:
    finite = [layer.relative for layer in data.layers if layer.relative is not None]
    largest = max(finite, default=0.0) or 1.0
    rows = [
        (
            Cell(layer.path, class_="key"),
            Cell(bar(None if layer.relative is None else layer.relative / largest), _order(layer.relative)),
            Cell(figure_in_words(layer.relative), _order(layer.relative)),
            Cell(f"{layer.tensors:,}", layer.tensors),
        )
        for layer in data.layers
    ]
    caption = "Layers, what moved most first"
    if data.layers_count > len(rows):
        caption += f" (the first {len(rows):,} of {data.layers_count:,})"
    columns = ["Layer", "", "Relative change", "Tensors"]
    return tag("div", table(columns, rows, caption=caption, numbers=["Relative change", "Tensors"]), id="layers")


def _tensors_summary(data: Movement) -> str:
    shown = len(data.tensors)
    return (
        f"All {shown:,} tensors" if shown == data.count else f"The {shown:,} of {data.count:,} tensors that moved most"
    )


def _tensors(data: Movement) -> Html:
    rows: list[Row] = []
    for tensor in data.tensors:
        figures = [tensor.relative, tensor.max_abs, tensor.norm]
        cells = [Cell(figure_in_words(value), _order(value)) for value in figures]
        rows.append((Cell(tensor.path, class_="key"), _outcome(tensor), *cells))
    numbers = ["Relative change", "Largest change", "Norm before"]
    found = table(["Key", "Outcome", *numbers], rows, caption="Tensors, what moved most first", numbers=numbers)
    return tag("div", found, id="tensors")


def _outcome(tensor: TensorMove) -> Cell:
    if tensor.nan_in_one:
        return Cell(f"{tensor.nan_in_one:,} NaN at one of the two", class_="bad")
    return Cell("equal" if tensor.equal else "changed")


def _order(value: float | None) -> float:
    """What is no finite number stands above all that are."""
    return _ABOVE_ALL if value is None else value
