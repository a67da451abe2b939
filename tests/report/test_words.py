"""Figures in words, and markup that a text cannot become."""

import pytest

from lastgood.cli._report import words
from lastgood.cli._report.markup import Cell, Html, bar, table, tag


def test_texts_are_escaped_and_markup_is_not() -> None:
    inner = tag("b", "<i>", title='"&')
    assert inner == '<b title="&quot;&amp;">&lt;i&gt;</b>'
    assert tag("p", inner, "<", class_="x", data_order=3, hidden=None) == f'<p class="x" data-order="3">{inner}&lt;</p>'
    assert isinstance(inner, Html)


def test_a_table_escapes_its_cells_and_notes_what_to_sort_by() -> None:
    found = table(["Key", "Size"], [("<a>", Cell("1 KiB", 1024))], caption="<c>", numbers=["Size"])
    assert "<td>&lt;a&gt;</td>" in found
    assert '<td class="number" data-order="1024">1 KiB</td>' in found
    assert "<caption>&lt;c&gt;</caption>" in found


def test_a_bar_is_never_longer_than_its_cell() -> None:
    assert 'width="100.0"' in bar(7.0)
    assert 'width="25.0"' in bar(0.25)
    assert "unbounded" in bar(None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("weight.0", "weight.0"),
        ("a\u202eb", "a\\u202eb"),
        ("a\x00b", "a\\x00b"),
        ("a\udc80b", "a\\udc80b"),
        ("größe", "größe"),
    ],
)
def test_names_cannot_hide_what_they_are(text: str, shown: str) -> None:
    assert words.printable(text) == shown


def test_long_names_are_cut() -> None:
    assert words.printable("x" * 300, 10) == "x" * 10 + "..."


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0, "1970-01-01 00:00:00"), (1_795_500_000.9, "2026-11-24 06:00:00"), (1e18, "1e+18 s since 1970")],
)
def test_moments_are_those_of_utc(seconds: float | None, shown: str) -> None:
    assert words.moment_in_words(seconds) == shown


def test_counts_and_metrics_in_words() -> None:
    assert words.count_in_words(1, "save") == "1 save"
    assert words.count_in_words(1234, "save") == "1,234 saves"
    assert words.metrics_in_words({"loss": 0.123456, "nan": None}) == "loss 0.1235, nan not finite"
