"""The sections of the page: what the script draws into, and the same figures as sentences and tables.

Without scripts, and in print, everything but the time line and the map is there.
"""

from collections.abc import Iterator

from lastgood.cli._output import human_bytes
from lastgood.cli._report.data import CheckpointRow, Figure, Lane, Report, Retention, Saves
from lastgood.cli._report.markup import Cell, Html, Row, join, more, table, tag
from lastgood.cli._report.words import count_in_words, metrics_in_words, moment_in_words, seconds_in_words

_LANE_WIDTH = 1000


def header(report: Report) -> Html:
    """Whose run this is and how it stands."""
    health, saves = report.health, report.saves
    latest = "none" if health.latest_step is None else f"{health.latest_step:,}"
    tiles = [
        ("Latest step", latest),
        ("Committed", f"{health.committed:,}"),
        ("On disk", human_bytes(health.nbytes)),
        ("Saves logged", f"{saves.count:,}"),
        ("Failed saves", f"{saves.failures:,}"),
        ("Restarts", f"{saves.restarts:,}"),
    ]
    links = [("#saves", "Saves"), ("#retention", "Retention"), ("#space", "Space"), ("#movement", "Movement")]
    return join(
        [
            tag("p", "lastgood report", class_="eyebrow"),
            tag("h1", report.name),
            tag("p", report.root, class_="path"),
            tag("p", " ".join(health.sentences), id="health", class_="good" if health.is_good else "bad"),
            tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles), class_="tiles"),
            tag("nav", *(tag("a", text, href=link) for link, text in links), aria_label="Sections"),
        ]
    )


def footer(report: Report) -> Html:
    """When and by what the page was made."""
    made = f"Made {moment_in_words(report.made_at)} by lastgood {report.lastgood}. All times are UTC."
    return tag("p", made)


def saves(data: Saves) -> Html:
    """The time line, its figures, and what went wrong."""
    if not data.count:
        return tag("p", "The run's log tells of no saves.", class_="empty")
    parts = [_timeline_controls(), _timeline()]
    shown = len(data.columns.time)
    if shown < data.count:
        text = f"Of {data.count:,} saves, the {shown:,} that stand out in their stretch of the run are drawn."
        parts.append(tag("p", text, class_="note"))
    parts.append(
        table(
            ["Measure", "Saves", "Median", "95th percentile", "Largest"],
            [_figure_row(figure) for figure in data.figures],
            caption="Over all saves of the log",
            numbers=["Saves", "Median", "95th percentile", "Largest"],
        )
    )
    if data.failures:
        parts.append(more(f"{count_in_words(data.failures, 'failed save')}", _failures(data)))
    if data.events:
        rows = [(moment_in_words(event.time), _number(event.step), event.words) for event in data.events]
        events = table(["When (UTC)", "Step", "What"], rows, caption="Starts, resumes, set aside", numbers=["Step"])
        parts.append(more(count_in_words(len(data.events), "start or resume", "starts and resumes"), events))
    return join(parts)


def _timeline_controls() -> Html:
    measures = [("stall", "Stall"), ("staged", "Staging"), ("durable", "Until durable"), ("nbytes", "Size")]
    shown = [_choice("checkbox", "measure", value, label, checked=True) for value, label in measures]
    along = [
        _choice("radio", "axis", "time", "Wall clock", checked=True),
        _choice("radio", "axis", "step", "Step", checked=False),
    ]
    return tag(
        "div",
        tag("fieldset", tag("legend", "Show"), *shown),
        tag("fieldset", tag("legend", "Along"), *along),
        tag(
            "fieldset", tag("legend", "Scale"), _choice("checkbox", "logarithmic", "yes", "Logarithmic", checked=False)
        ),
        tag("button", "Whole run", type="button", id="whole-run", disabled="disabled"),
        class_="controls needs-script",
    )


def _choice(kind: str, name: str, value: str, label: str, *, checked: bool) -> Html:
    chosen = "checked" if checked else None
    return tag("label", tag("input", type=kind, name=name, value=value, checked=chosen), label)


def _timeline() -> Html:
    help_text = "Arrow keys go from save to save, + and - zoom, Escape shows the whole run. Drag to zoom in."
    return join(
        [
            tag(
                "div",
                id="timeline",
                class_="needs-script",
                tabindex=0,
                role="group",
                aria_label=f"Time line. {help_text}",
            ),
            tag("p", help_text, id="readout", class_="readout needs-script", aria_live="polite"),
            tag("noscript", tag("p", "The time line needs scripts.", class_="note")),
        ]
    )


def _figure_row(figure: Figure) -> Row:
    values = [figure.median, figure.p95, figure.largest]
    words = [human_bytes(round(value)) if figure.unit == "bytes" else seconds_in_words(value) for value in values]
    return (figure.name, _number(figure.count), *map(Cell, words, values))


def _failures(data: Saves) -> Html:
    columns = data.columns
    rows = [
        (moment_in_words(columns.time[place]), _number(columns.step[place]), error)
        for place, error in zip(columns.failed, columns.errors, strict=True)
    ]
    return table(["When (UTC)", "Step", "Error"], rows, caption="Saves that failed", numbers=["Step"])


def retention(data: Retention) -> Html:
    """Which checkpoints are there, why, and which have gone."""
    parts = []
    if data.rules:
        parts.append(tag("p", "Rules of the newest run: " + "; ".join(data.rules) + ".", id="rules"))
    if data.problem:
        parts.append(tag("p", data.problem, class_="note"))
    parts.append(_lanes(data.lanes))
    columns = ["Step", "Fate", "Why", "Condition", "Saved (UTC)", "Size", "Metrics"]
    if data.checkpoints:
        rows = [_checkpoint_row(row) for row in reversed(data.checkpoints)]
        parts.append(table(columns, rows, caption="Checkpoints that are there", numbers=["Step", "Size"]))
    else:
        parts.append(tag("p", "There are no checkpoints.", class_="empty"))
    if data.removed:
        gone = [
            (_number(row.step), moment_in_words(row.time), "; ".join(row.reasons)) for row in reversed(data.removed)
        ]
        listed = table(["Step", "When (UTC)", "Why"], gone, caption="Removed", numbers=["Step"])
        if data.removed_count > len(gone):
            listed = join([tag("p", f"The last {len(gone):,} of {data.removed_count:,}.", class_="note"), listed])
        parts.append(more(f"{count_in_words(data.removed_count, 'checkpoint')} removed", listed))
    if data.set_aside:
        aside = [(row.name, moment_in_words(row.time), row.problem) for row in data.set_aside]
        listed = table(["Name", "When (UTC)", "Problem"], aside, caption="Set aside")
        parts.append(more(f"{count_in_words(len(aside), 'checkpoint')} set aside", listed))
    return join(parts)


def _checkpoint_row(row: CheckpointRow) -> Row:
    return (
        _number(row.step),
        Cell(row.fate, class_="fate " + row.fate.replace(" ", "-")),
        Cell("; ".join(row.reasons), class_="wide"),
        row.condition,
        moment_in_words(row.saved_at),
        Cell(human_bytes(row.nbytes), row.nbytes),
        metrics_in_words(row.metrics) or "-",
    )


def _number(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def _lanes(lanes: list[Lane]) -> Html:
    steps = [step for lane in lanes for step in lane.steps]
    if not steps:
        return Html()
    first, last = min(steps), max(steps)
    axis = tag(
        "div", tag("span"), tag("p", tag("span", f"step {first:,}"), tag("span", f"{last:,}")), class_="lane axis"
    )
    return tag("div", *_lane_rows(lanes, first, last), axis, class_="lanes", role="group", aria_label="Steps by rule")


def _lane_rows(lanes: list[Lane], first: int, last: int) -> Iterator[Html]:
    for lane in lanes:
        places = sorted({round((_LANE_WIDTH - 8) * (step - first) / ((last - first) or 1)) + 4 for step in lane.steps})
        ticks = tag("path", d="".join(f"M{place} 2V14" for place in places))
        said = f"{lane.label}: " + (", ".join(map(str, lane.steps[-20:])) or "none")
        drawing = tag(
            "svg", tag("title", said), ticks, viewBox=f"0 0 {_LANE_WIDTH} 16", preserveAspectRatio="none", role="img"
        )
        label = tag("span", lane.label, tag("small", f"{len(lane.steps):,}"), class_="lane-label")
        yield tag("div", label, drawing, class_=f"lane {lane.kind}")
