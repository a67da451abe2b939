"""The picture is a whole SVG with a mark for every kill; the screen is readable without a terminal."""

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from lastgood.cli._demo.figures import Comparison, Part
from lastgood.cli._demo.picture import draw
from lastgood.cli._demo.protocol import Event, Resumed, StepDone
from lastgood.cli._demo.screen import print_verdict, progress_of
from lastgood.cli._demo.supervisor import Killed, Landed, Life

SVG = "{http://www.w3.org/2000/svg}"


def _life(first: int, last: int, killed: Killed | None = None) -> Life:
    steps: list[Event] = [StepDone(step, loss=5.0 / step, seconds=0.1) for step in range(first + 1, last + 1)]
    return Life([Resumed(first, 0.1), *steps], 1.0, killed)


REFERENCE = [_life(0, 40)]
LIVES = [
    _life(0, 12, Killed(12, "in a step")),
    _life(10, 20, Killed(20, "in a save")),
    _life(10, 22, Killed(22, "staged")),
    _life(20, 40),
]


def _elements(picture: str, tag: str, kind: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(picture).iter(SVG + tag) if element.get("class") == kind]


def test_every_kill_has_a_mark_at_its_step() -> None:
    kills = _elements(draw(REFERENCE, LIVES, title="three kills"), "g", "kill")
    titles = [kill.findtext(SVG + "title") for kill in kills]
    assert titles == [
        "kill 1, after step 12, in a step",
        "kill 2, after step 20, in a save",
        "kill 3, after step 22, staged",
    ]
    places = [float(kill.find(SVG + "line").get("x1")) for kill in kills]
    assert (places[1] - places[0]) / (places[2] - places[1]) == pytest.approx(4.0, rel=0.01)


def test_both_curves_and_the_repeated_steps_are_drawn() -> None:
    picture = draw(REFERENCE, LIVES, title="three kills")
    (reference,) = _elements(picture, "polyline", "reference")
    killed = _elements(picture, "polyline", "killed")
    assert len(reference.get("points").split()) == 40
    assert [len(curve.get("points").split()) for curve in killed] == [12, 11, 13, 21]
    assert set(killed[3].get("points").split()) <= set(reference.get("points").split())
    bands = [float(band.get("width")) for band in _elements(picture, "rect", "repeated")[1:]]
    assert [band / bands[0] for band in bands] == pytest.approx([1, 5, 1], rel=0.01)
    assert len(_elements(picture, "rect", "again")) == 3
    assert len(_elements(picture, "rect", "life")) == 4


def test_a_life_that_resumes_beyond_the_one_before_repeats_nothing() -> None:
    # The checkpoint of step 20 landed when the second life had begun.
    lives = [_life(0, 21, Killed(21, "staged")), _life(10, 15, Killed(15, "in a step")), _life(20, 40)]
    picture = draw(REFERENCE, lives, title="late")
    bands = [float(band.get("width")) for band in _elements(picture, "rect", "repeated")[1:]]
    assert bands[0] == pytest.approx(5 * bands[1], rel=0.01)
    assert bands[1] > 0


def test_a_title_with_markup_stays_text() -> None:
    title = ElementTree.fromstring(draw(REFERENCE, REFERENCE, title='<script> & "quotes"')).findtext(SVG + "title")
    assert title == '<script> & "quotes"'


@pytest.mark.parametrize("loss", [0.0, 1e-7, 3.0, 4e5])
def test_a_flat_curve_can_be_drawn(loss: float) -> None:
    life = [Life([StepDone(1, loss, 0.1)])]
    assert len(_elements(draw(life, life, title="flat"), "polyline", "killed")) == 1


def _told(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with progress_of(console, "killed", 40) as observe:
        for event in (*LIVES[0].events, Killed(12, "staged"), Landed(12), Resumed(10, 0.1, ("step-12 is [damaged]",))):
            observe(event)
    return console.file.getvalue()


def test_without_a_terminal_progress_is_plain_lines() -> None:
    assert _told(terminal=False).splitlines() == [
        "killed: step 8 of 40, loss 0.625",
        "  SIGKILL after step 12, in the middle of a save: staged, not yet durable",
        "  its checkpoint process finished the save of step 12",
        "  passed over: step-12 is [damaged]",
        "  resumed at step 10",
    ]


def test_on_a_terminal_kills_are_told_above_a_bar() -> None:
    told = _told(terminal=True)
    assert "SIGKILL after step 12, in the middle of a save" in told
    assert "passed over: step-12 is [damaged]" in told
    assert "10/40" in told  # The bar falls back to the step that was resumed from.


def test_a_difference_is_said_where_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    parts = (Part("everything", "aa", "bb"),)
    different = tuple(f"model.layer.{index}" for index in range(12))
    print_verdict(console, Comparison(parts, different, files_hold_what_was_in_memory=False))
    told = console.file.getvalue()
    assert "differ in 12 places" in told
    assert "model.layer.9\n" in told
    assert "model.layer.10" not in told
    assert "does not hold what its training process had in memory" in told
    assert "identical" not in told
