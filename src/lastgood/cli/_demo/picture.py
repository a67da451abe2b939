"""The picture of a demo run: one SVG file that needs nothing else, drawn by hand."""

from collections.abc import Sequence
from html import escape

from lastgood.cli._demo.figures import repeated_spans
from lastgood.cli._demo.protocol import StepDone
from lastgood.cli._demo.supervisor import Life

_WIDTH = 960
_LEFT, _RIGHT = 64, 936
_CURVE_TOP, _CURVE_BOTTOM = 96, 396
_LIVES_TOP, _ROW = 452, 20
_LABEL_WIDTH = 56
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #333; }
  .title { font-size: 19px; font-weight: 600; }
  .small { font-size: 11px; fill: #666; paint-order: stroke; stroke: #fff; stroke-width: 4; }
  .axis { stroke: #999; } .grid { stroke: #e6e6e6; }
  .reference { fill: none; stroke: #a9c9ee; stroke-width: 7; stroke-linejoin: round; stroke-linecap: round; }
  .killed { fill: none; stroke: #123f73; stroke-width: 1.6; stroke-linejoin: round; }
  .repeated { fill: #e0632b; opacity: 0.16; }
  .kill line { stroke: #c0392b; stroke-dasharray: 3 3; }
  .kill path { stroke: #c0392b; stroke-width: 2.4; }
  .kill text { fill: #c0392b; text-anchor: middle; font-size: 11px; }
  .life { fill: #123f73; } .again { fill: #e0632b; }
"""


class _Scale:
    """From values to places along one axis of the picture."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._per_unit = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self._low) * self._per_unit, 2)


def draw(reference: list[Life], killed: list[Life], *, title: str) -> str:
    """The loss of both runs over their steps, one over the other, a mark for every kill, and each process's life."""
    losses = [event.loss for life in reference + killed for event in life.events if isinstance(event, StepDone)]
    last_step = max(life.last_step for life in reference + killed)
    across = _Scale(0, last_step, _LEFT, _RIGHT)
    up = _Scale(min(losses, default=0.0), max(losses, default=1.0), _CURVE_BOTTOM - 8, _CURVE_TOP + 8)
    height = _LIVES_TOP + _ROW * len(killed) + 44
    content = [
        f'<text class="title" x="{_LEFT}" y="32">{escape(title)}</text>',
        *_legend(),
        *_axes(across, up, losses, last_step),
        *_repeated(killed, across),
        *_curves(reference, across, up, "reference"),
        *_curves(killed, across, up, "killed"),
        *_kills(killed, across),
        *_lives(killed, across),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            *content,
            "</svg>\n",
        ]
    )


def _legend() -> list[str]:
    y = 58
    return [
        f'<path class="reference" d="M{_LEFT + 4} {y - 4} h28"/>',
        f'<text x="{_LEFT + 44}" y="{y}">never killed</text>',
        f'<path class="killed" d="M{_LEFT + 150} {y - 4} h32"/>',
        f'<text x="{_LEFT + 190}" y="{y}">killed and resumed</text>',
        f'<rect class="repeated" x="{_LEFT + 336}" y="{y - 12}" width="32" height="15"/>',
        f'<text x="{_LEFT + 376}" y="{y}">steps done twice</text>',
    ]


def _axes(across: _Scale, up: _Scale, losses: Sequence[float], last_step: int) -> list[str]:
    parts = []
    for loss in _round_values(min(losses, default=0.0), max(losses, default=1.0)):
        y = up(loss)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="small" x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{loss:g}</text>')
    for step in _round_values(0, last_step):
        x = across(step)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{_CURVE_BOTTOM}" y2="{_CURVE_BOTTOM + 5}"/>')
        parts.append(f'<text class="small" x="{x}" y="{_CURVE_BOTTOM + 18}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_CURVE_BOTTOM}" y2="{_CURVE_BOTTOM}"/>')
    parts.append(f'<text class="small" x="{_RIGHT}" y="{_CURVE_BOTTOM + 34}" text-anchor="end">step</text>')
    parts.append(f'<text class="small" x="{_LEFT - 8}" y="{_CURVE_TOP - 6}" text-anchor="end">loss</text>')
    return parts


def _round_values(low: float, high: float) -> list[float]:
    """Some five round numbers between two others."""
    span = (high - low) or 1.0
    magnitude = 1.0
    while magnitude > span:
        magnitude /= 10
    while magnitude * 10 <= span:
        magnitude *= 10
    unit = next(unit for unit in (magnitude / 5, magnitude / 2, magnitude, magnitude * 2) if span / unit <= 6)
    first = -int(-low // unit)
    return [round(index * unit, 6) for index in range(first, int(high // unit) + 1)]


def _curves(lives: list[Life], across: _Scale, up: _Scale, kind: str) -> list[str]:
    """One line a life, from the point that it resumed at: where an earlier life had been."""
    curves = []
    losses: dict[int, float] = {}
    for life in lives:
        done = {event.step: event.loss for event in life.events if isinstance(event, StepDone)}
        if life.first_step in losses:
            done = {life.first_step: losses[life.first_step], **done}
        points = " ".join(f"{across(step)},{up(loss)}" for step, loss in done.items())
        curves.append(f'<polyline class="{kind}" points="{points}"/>')
        losses |= done
    return curves


def _repeated(lives: list[Life], across: _Scale) -> list[str]:
    bands = []
    for first, last in repeated_spans(lives):
        start, end = across(first), across(last)
        bands.append(
            f'<rect class="repeated" x="{start}" y="{_CURVE_TOP}" width="{round(end - start, 2)}" '
            f'height="{_CURVE_BOTTOM - _CURVE_TOP}"/>'
        )
    return bands


def _kills(lives: list[Life], across: _Scale) -> list[str]:
    bottom = _LIVES_TOP + _ROW * len(lives)
    marks = []
    free_from = 0.0  # A label that would stand on the one before is left out; the title has it all the same.
    for number, life in enumerate(lives, 1):
        if not life.killed:
            continue
        x, y = across(life.killed.last_step), _CURVE_TOP - 8
        where = life.killed.moment
        marks.append(
            f'<g class="kill"><title>kill {number}, after step {life.killed.last_step}, {where}</title>'
            f'<line x1="{x}" x2="{x}" y1="{y + 8}" y2="{bottom}"/>'
            f'<path d="M{x - 5} {y - 5} l10 10 m0 -10 l-10 10"/>'
            + (f'<text x="{x}" y="{y - 10}">{where}</text></g>' if x >= free_from else "</g>")
        )
        if x >= free_from:
            free_from = x + _LABEL_WIDTH
    return marks


def _lives(lives: list[Life], across: _Scale) -> list[str]:
    parts = [f'<text class="small" x="{_LEFT}" y="{_LIVES_TOP - 8}">each process, from the step it resumed at</text>']
    spans = [(lives[0].first_step, lives[0].first_step), *repeated_spans(lives)]
    for row, (life, (first, again)) in enumerate(zip(lives, spans, strict=True)):
        y = _LIVES_TOP + row * _ROW + 4
        last = life.last_step
        if again > first:
            parts.append(_bar("again", across(first), across(again), y))
        parts.append(_bar("life", across(again), across(last), y))
        parts.append(f'<text class="small" x="{_LEFT - 8}" y="{y + 10}" text-anchor="end">{row + 1}</text>')
    return parts


def _bar(kind: str, start: float, end: float, y: float) -> str:
    return f'<rect class="{kind}" x="{start}" y="{y}" width="{round(max(end - start, 1.0), 2)}" height="12"/>'
