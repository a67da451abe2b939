"""The page in a real browser: every control does what it says, and what is shown is what the data says."""

import base64
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tests.report import sample_run
from tests.report.browser import chromium, colours_of, complaints, show

import lastgood
from lastgood.cli._output import human_bytes
from lastgood.cli._report.data import Report
from lastgood.cli._report.gather import Wanted, gather
from lastgood.cli._report.page import render
from lastgood.manager.run_log import RunRecord, SaveRecord

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def window() -> Iterator[WebDriver]:
    with chromium() as found:
        yield found


@pytest.fixture
def shown(window: WebDriver, page: Path) -> Iterator[WebDriver]:
    """The sample run's page, freshly loaded; whatever a test does with it, nothing may be said on the console."""
    complaints(window)
    show(window, page)
    yield window
    assert complaints(window) == []


def _one(window: WebDriver, selector: str) -> WebElement:
    return window.find_element(By.CSS_SELECTOR, selector)


def _all(window: WebDriver, selector: str) -> list[WebElement]:
    return window.find_elements(By.CSS_SELECTOR, selector)


def _column(window: WebDriver, table: str, column: int) -> list[str]:
    cells = f"{table} tbody td:nth-child({column})"
    return list(
        window.execute_script("return [...document.querySelectorAll(arguments[0])].map(c => c.textContent)", cells)
    )


def _render(tmp_path: Path, root: Path) -> Path:
    out = tmp_path / "page.html"
    out.write_text(render(gather(str(root), Wanted())), encoding="utf-8")
    return out


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_the_page_fits_its_window_and_is_not_blank(
    shown: WebDriver, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    show(shown, page, width=width, dark=dark)
    assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    height = shown.execute_script("return document.documentElement.scrollHeight")
    show(shown, page, width=width, height=height, dark=dark)
    brightness = shown.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", brightness)[:3])) < 200) == dark
    picture = tmp_path / "page.png"
    assert shown.save_screenshot(str(picture))
    assert colours_of(shown, picture) > 100


def test_the_header_says_what_the_data_says(shown: WebDriver, report: Report) -> None:
    tiles = {
        tile.find_element(By.TAG_NAME, "dt").text: tile.find_element(By.TAG_NAME, "dd").text
        for tile in _all(shown, ".tiles div")
    }
    assert tiles == {
        "Latest step": "3,000",
        "Committed": str(len(sample_run.KEPT)),
        "On disk": human_bytes(report.health.nbytes),
        "Saves logged": "300",
        "Failed saves": "3",
        "Restarts": "2",
    }
    assert _one(shown, "h1").text == "gpt-run"
    assert _one(shown, "#health").text == " ".join(report.health.sentences)


def test_measures_can_be_hidden_and_shown(shown: WebDriver) -> None:
    def panels() -> list[str | None]:
        return [panel.get_attribute("data-measure") for panel in _all(shown, ".panel")]

    assert panels() == ["stall", "staged", "durable", "nbytes"]
    for measure in ("stall", "staged", "durable", "nbytes"):
        box = _one(shown, f'input[value="{measure}"]')
        box.click()
        assert measure not in panels()
        box.click()
        assert measure in panels()


def test_the_axis_is_the_clock_or_the_step(shown: WebDriver) -> None:
    def labels() -> list[str]:
        return [label.text for label in _all(shown, ".axis-labels span")]

    assert all(re.fullmatch(r"\d\d:\d\d", label) for label in labels())
    _one(shown, 'input[value="step"]').click()
    assert all(re.fullmatch(r"[\d,]+", label) for label in labels())
    assert "1,000" in labels()
    _one(shown, 'input[value="time"]').click()
    assert ":" in labels()[0]


def test_a_logarithmic_scale_moves_the_dots(shown: WebDriver) -> None:
    def path() -> str | None:
        return _one(shown, '.panel[data-measure="stall"] .dots').get_attribute("d")

    before = path()
    _one(shown, 'input[name="logarithmic"]').click()
    assert path() != before
    _one(shown, 'input[name="logarithmic"]').click()
    assert path() == before


def test_every_save_failure_and_restart_is_drawn(shown: WebDriver, report: Report) -> None:
    def marks(selector: str) -> int:
        return (_one(shown, selector).get_attribute("d") or "").count("M")

    columns = report.saves.columns
    assert marks('.panel[data-measure="stall"] .dots') == len(columns.stall) == 300
    assert marks('.panel[data-measure="durable"] .dots') == sum(secs is not None for secs in columns.durable) == 297
    assert marks(".failures-lane .failures") == 3
    assert marks(".restarts-lane .restarts") == 2


def test_arrow_keys_go_through_the_saves_and_show_their_figures(shown: WebDriver, report: Report) -> None:
    line, readout = _one(shown, "#timeline"), _one(shown, "#readout")
    line.send_keys(Keys.END)
    assert readout.text.startswith("Step 3,000 at 2026-11-24 21:00:00: stall ")
    assert f"size {human_bytes(report.saves.columns.nbytes[-1] or 0)}" in readout.text
    line.send_keys(Keys.ARROW_LEFT)
    assert readout.text.startswith("Step 2,990 ")
    line.send_keys(Keys.HOME)
    assert readout.text.startswith("Step 10 ")
    line.send_keys(Keys.ARROW_RIGHT * 76)
    assert readout.text.startswith("Step 770 ")
    assert "Failed: StorageError: no space left on device" in readout.text
    line.send_keys(Keys.ARROW_RIGHT * 43)
    assert readout.text.startswith("Step 1,200 ")
    assert "Started again on node-7, process 4141" in readout.text
    assert "Went on from step 1180, read in 1.3 s" in readout.text


def test_the_save_under_the_pointer_is_shown(shown: WebDriver, report: Report) -> None:
    axis = _one(shown, ".axis-labels")
    for share in (0.25, 0.75):
        across = round(axis.size["width"] * (share - 0.5))
        panel = _one(shown, '.panel[data-measure="stall"]')
        ActionChains(shown).move_to_element_with_offset(panel, across, 0).perform()
        found = re.match(r"Step ([\d,]+) ", _one(shown, "#readout").text)
        assert found
        step = int(found[1].replace(",", ""))
        assert abs(step - 3000 * share) <= 30


def test_dragging_zooms_in_and_there_is_a_way_back(shown: WebDriver) -> None:
    def drawn() -> int:
        return int(_one(shown, '.panel[data-measure="stall"]').get_attribute("data-drawn") or 0)

    button, line = _one(shown, "#whole-run"), _one(shown, "#timeline")
    assert not button.is_enabled()
    panel = _one(shown, '.panel[data-measure="stall"]')
    for way_back in (button.click, lambda: line.send_keys(Keys.ESCAPE)):
        ActionChains(shown).move_to_element(panel).click_and_hold().move_by_offset(200, 0).release().perform()
        assert 30 < drawn() < 90
        assert button.is_enabled()
        way_back()
        assert drawn() == 300
        panel = _one(shown, '.panel[data-measure="stall"]')


def test_plus_and_minus_zoom_about_the_chosen_save(shown: WebDriver) -> None:
    def drawn() -> int:
        return int(_one(shown, '.panel[data-measure="stall"]').get_attribute("data-drawn") or 0)

    line = _one(shown, "#timeline")
    line.send_keys(Keys.END, "+")
    assert 140 < drawn() < 160
    line.send_keys("+")
    assert 70 < drawn() < 80
    line.send_keys("-", "-")
    assert drawn() == 300
    line.send_keys("+", "+", Keys.HOME)  # a save that is not in view brings the whole run back
    assert drawn() == 300


class _Map:
    """The map as a reader of the data would draw it."""

    def __init__(self, report: Report) -> None:
        assert report.space is not None
        self.nodes = report.space.nodes

    def children(self, node: int) -> list[int]:
        """What is drawn in a node: tied weights, which take no space of their own, are not."""
        below = [child for child, parent in enumerate(self.nodes.parent) if parent == node]
        found = [child for child in below if self.nodes.nbytes[child] > 0]
        return sorted(found, key=lambda child: -self.nodes.nbytes[child])

    def named(self, *names: str) -> int:
        node = 0
        for name in names:
            (node,) = [child for child in self.children(node) if self.nodes.name[child] == name]
        return node


def _top_tiles(window: WebDriver) -> dict[int, WebElement]:
    return {int(tile.get_attribute("data-node") or -1): tile for tile in _all(window, ".tile.depth-1")}


def _click_title(window: WebDriver, node: int) -> None:
    """A click near the upper edge: the middle of a tile is that of a tile in it."""
    tile = _top_tiles(window)[node]
    ActionChains(window).move_to_element(tile).move_by_offset(0, 8 - tile.size["height"] // 2).click().perform()


def _place(window: WebDriver) -> list[str]:
    return [part.text for part in _all(window, "#map-path button, #map-path [aria-current]")]


def test_areas_on_the_map_are_as_the_bytes(shown: WebDriver, report: Report) -> None:
    space, tiles = _Map(report), _top_tiles(shown)
    assert list(tiles) == space.children(0)
    whole = _one(shown, "#map").size
    for node, tile in tiles.items():
        share = tile.size["width"] * tile.size["height"] / (whole["width"] * whole["height"])
        assert share == pytest.approx(space.nodes.nbytes[node] / space.nodes.nbytes[0], abs=0.02)


def test_tiles_lie_in_the_map_and_beside_each_other(shown: WebDriver) -> None:
    whole, tiles = _one(shown, "#map").rect, [tile.rect for tile in _top_tiles(shown).values()]
    for tile in tiles:
        assert tile["x"] >= whole["x"] - 1
        assert tile["y"] >= whole["y"] - 1
        assert tile["x"] + tile["width"] <= whole["x"] + whole["width"] + 1
        assert tile["y"] + tile["height"] <= whole["y"] + whole["height"] + 1
    for first, second in itertools.combinations(tiles, 2):
        is_beside = first["x"] + first["width"] <= second["x"] + 1 or second["x"] + second["width"] <= first["x"] + 1
        is_above = first["y"] + first["height"] <= second["y"] + 1 or second["y"] + second["height"] <= first["y"] + 1
        assert is_beside or is_above


def test_a_click_zooms_in_and_breadcrumbs_and_escape_zoom_out(shown: WebDriver, report: Report) -> None:
    space = _Map(report)
    assert _place(shown) == ["step 3000"]
    model = space.named("model")
    _click_title(shown, model)
    assert _place(shown) == ["step 3000", "model"]
    assert list(_top_tiles(shown)) == space.children(model)
    _click_title(shown, space.named("model", "transformer"))
    assert _place(shown) == ["step 3000", "model", "transformer"]
    _one(shown, "#map-path button:nth-of-type(2)").click()
    assert _place(shown) == ["step 3000", "model"]
    _one(shown, "#map-path button").send_keys(Keys.ESCAPE)
    assert _place(shown) == ["step 3000"]


def test_the_map_works_by_keys_alone(shown: WebDriver, report: Report) -> None:
    space = _Map(report)
    tabbable = _all(shown, '#map [tabindex="0"]')
    assert len(tabbable) == 1
    tabbable[0].send_keys(Keys.ARROW_RIGHT)
    second = shown.switch_to.active_element
    assert int(second.get_attribute("data-node") or -1) == space.children(0)[1]
    second.send_keys(Keys.ENTER)
    assert _place(shown) == ["step 3000", space.nodes.name[space.children(0)[1]]]
    shown.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert _place(shown) == ["step 3000"]
    # The focus is where it was before.
    assert shown.switch_to.active_element.get_attribute("data-node") == str(space.children(0)[1])


def test_a_tensor_under_the_pointer_is_told_in_full(shown: WebDriver, report: Report) -> None:
    embedding = _Map(report).named("model", "transformer", "wte", "weight")
    ActionChains(shown).move_to_element(_one(shown, f'.tile[data-node="{embedding}"]')).perform()
    share = f"{100 * 256_000 / report.space.nbytes:.3g} %" if report.space else ""
    expected = f"model.transformer.wte.weight · float32 [1000, 64] · 250.0 KiB ({share})"
    assert _one(shown, "#map-detail").text == expected


def test_a_search_marks_keys_counts_them_and_leads_to_them(shown: WebDriver, report: Report) -> None:
    space, box = _Map(report), _one(shown, "#map-search")
    box.send_keys("C_ATTN")
    assert _one(shown, "#map-found").text == f"6 keys, {human_bytes(6 * 192 * 64 * 4)}"
    layer = space.named("model", "transformer", "h", "3", "attn", "c_attn")
    button = next(b for b in _all(shown, "#map-matches button") if b.text == "model.transformer.h.3.attn.c_attn.weight")
    button.click()
    assert _place(shown)[-1] == "c_attn"
    assert list(_top_tiles(shown)) == space.children(layer)
    assert "match" in (_one(shown, ".tile.depth-1").get_attribute("class") or "").split()
    box.clear()
    box.send_keys("no such key")
    assert _one(shown, "#map-found").text == "no key"
    box.send_keys(Keys.CONTROL + "a", Keys.DELETE)
    assert "searching" not in (_one(shown, "#map").get_attribute("class") or "")


def test_tables_are_sorted_by_a_click_on_a_head_and_the_other_way_by_the_next(shown: WebDriver, report: Report) -> None:
    assert report.movement is not None
    layers = [layer.path for layer in report.movement.layers]
    assert _column(shown, "#layers", 1) == layers  # what moved most first
    head = _one(shown, "#layers th:nth-child(1) button")
    head.click()
    by_name = _column(shown, "#layers", 1)
    assert by_name[0].startswith("model.lm_head")
    assert sorted(by_name) == sorted(layers)
    head.click()
    assert _column(shown, "#layers", 1) == by_name[::-1]
    _one(shown, "#layers th:nth-child(3) button").click()
    changes = [float(change) for change in _column(shown, "#layers", 3)]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > changes[-1]
    assert _one(shown, "#layers th:nth-child(3)").get_attribute("aria-sort") == "descending"


def test_long_tables_are_cut_until_asked_for(shown: WebDriver) -> None:
    def visible() -> int:
        return len([row for row in _all(shown, "#layers tbody tr") if row.is_displayed()])

    assert visible() == 25
    _one(shown, "#layers .all-rows").click()
    assert visible() == len(_all(shown, "#layers tbody tr")) > 30


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("3 failed saves", "TornSnapshotError"),
        ("6 starts and resumes", "passing over step 2380"),
        ("checkpoints removed", "none of the rules keeps it"),
        ("1 checkpoint set aside", "step-2380.set-aside"),
        ("The 50 largest tensors", "model.transformer.wte.weight"),
        ("All 129 tensors", "model.transformer.h.5.mlp.c_proj.weight"),
        ("1 key with another plain value", "epoch: 5, then 6"),
    ],
)
def test_details_open_and_tell(shown: WebDriver, summary: str, expected: str) -> None:
    (details,) = [found for found in _all(shown, "details") if summary in found.text]
    assert expected not in details.text
    details.find_element(By.TAG_NAME, "summary").click()
    assert expected in details.text


def test_the_page_prints(shown: WebDriver) -> None:
    pdf = base64.b64decode(shown.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 20_000


def test_without_scripts_the_figures_are_there_as_tables(window: WebDriver, page: Path) -> None:
    window.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(window, page)
        text = _one(window, "body").text
    finally:
        window.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    for expected in ("The time line needs scripts.", "Until durable", "every 1000 steps", "model.transformer.h.0.attn"):
        assert expected in text
    assert "Find keys" not in text  # what would do nothing is not there


HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "<!--<script>",
    "]]>-->${window.hacked = 1}`",
    "__proto__",
    "constructor",
    "a\u202egnp.exe",
    "\u2028\u2029\x00\x1b[31m",
    "javascript:window.hacked = 1",
]


def test_hostile_names_stay_names(window: WebDriver, tmp_path: Path) -> None:
    root = tmp_path / "<img src=x onerror='window.hacked = 1'>"
    states: list[dict[str, Any]] = [{name: torch.full((20,), value) for name in HOSTILE} for value in (1.0, 2.0)]
    checkpointer = lastgood.make_sync_checkpointer()
    for step, state in enumerate(states, 1):
        metrics = {name: 1.0 for name in HOSTILE if name.isprintable()}
        checkpointer.save(str(root / f"step-{step}"), state, step=step, saved_at=sample_run.START, metrics=metrics)
    checkpointer.close()
    rules = [{"rule": HOSTILE[0], HOSTILE[1]: HOSTILE[2]}]
    records = [
        RunRecord(time=1.0, pid=1, host=HOSTILE[0], world_size=1, rules=rules, lastgood=HOSTILE[1]),
        *(
            SaveRecord(time=2.0 + place, step=place, outcome="failed", stall_secs=0.1, error=name, phases={name: 0.1})
            for place, name in enumerate(HOSTILE)
        ),
    ]
    sample_run.write_log(root, list(records))
    complaints(window)
    show(window, _render(tmp_path, root))
    _one(window, "#map-search").send_keys("<")
    _one(window, "#timeline").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    for details in _all(window, "summary"):
        details.click()
    for tile in _all(window, ".tile.depth-1"):
        ActionChains(window).move_to_element(tile).perform()
    assert window.execute_script("return window.hacked") is None
    assert len(_all(window, "script")) == 2
    assert _all(window, "img, body svg[onload]") == []
    assert _one(window, "#readout").text.endswith(f"Failed: {HOSTILE[1]}")
    assert _one(window, "h1").text == root.name
    for name in HOSTILE[:4]:
        assert name in _one(window, "#retention").text
    shown_keys = _column(window, "#tensors", 1)
    assert set(shown_keys) >= set(HOSTILE[:7])
    assert "a\\u202egnp.exe" in shown_keys
    assert complaints(window) == []


def test_ten_thousand_saves_are_a_few_paths_and_can_all_be_reached(window: WebDriver, tmp_path: Path) -> None:
    lines = [msgspec.json.encode(record) for record in sample_run.log_records(3, 10_000)]
    (tmp_path / "lastgood.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    complaints(window)
    show(window, _render(tmp_path, tmp_path))
    assert len(_all(window, "#timeline path")) < 40
    longest = max(len(path.get_attribute("d") or "") for path in _all(window, "#timeline .spread"))
    assert longest < 40_000
    line = _one(window, "#timeline")
    line.send_keys(Keys.END, Keys.ARROW_LEFT)
    assert _one(window, "#readout").text.startswith("Step 99,990 ")
    line.send_keys("+" * 8)
    assert _all(window, '.panel[data-measure="stall"] .dots') != []
    assert complaints(window) == []


def test_a_run_with_nothing_in_it_yet_has_a_page_without_complaints(window: WebDriver, tmp_path: Path) -> None:
    (tmp_path / "step-10").mkdir()
    complaints(window)
    show(window, _render(tmp_path, tmp_path))
    assert "No checkpoint is committed" in _one(window, "#health").text
    assert complaints(window) == []
