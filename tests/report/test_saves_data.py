"""The time line's data: what the log says, thinned where it is long."""

import random

from hypothesis import given
from hypothesis import strategies as st
from tests.report import sample_run

from lastgood.cli._report.saves import MOST_SAVES, saves_of, thinned
from lastgood.manager.run_log import SaveRecord


def test_counts_failures_restarts_and_errors_are_those_of_the_log() -> None:
    saves = saves_of(list(sample_run.log_records(1)))
    assert (saves.count, saves.failures, saves.restarts) == (300, 3, 2)
    columns = saves.columns
    assert [columns.step[place] for place in columns.failed] == [770, 780, 2030]
    assert columns.errors == list(sample_run.FAILED.values())
    assert [columns.durable[place] for place in columns.failed] == [None] * 3


def test_a_restart_stands_where_the_run_was_and_its_resume_where_it_went_on() -> None:
    events = [(event.kind, event.step) for event in saves_of(list(sample_run.log_records(1))).events]
    assert events == [
        ("start", 0),
        ("restart", 1190),
        ("resume", 1180),
        ("restart", 2390),
        ("set aside", 2380),
        ("resume", 2370),
    ]


def test_the_words_of_a_resume_name_what_was_passed_over() -> None:
    words = [event.words for event in saves_of(list(sample_run.log_records(1))).events]
    assert words[-1] == "Went on from step 2370, read in 2.6 s, passing over step 2380"
    assert words[-2].startswith("Step 2380 was set aside as step-2380.set-aside: a block of the tensor")


def test_figures_are_over_all_saves_that_have_them() -> None:
    records = [
        SaveRecord(time=number, step=number, outcome="durable", stall_secs=number / 100, durable_secs=durable)
        for number, durable in enumerate([None, *range(1, 21)])
    ]
    figures = {figure.name: figure for figure in saves_of(records).figures}
    stall, durable = figures["Stall of training"], figures["Until durable"]
    assert (stall.count, stall.median, stall.p95, stall.largest) == (21, 0.1, 0.19, 0.2)
    assert (durable.count, durable.median, durable.p95, durable.largest) == (20, 10, 19, 20)
    assert "Until staged" not in figures


def test_an_empty_log_gives_an_empty_time_line() -> None:
    saves = saves_of([])
    assert (saves.count, saves.restarts, saves.columns.time, saves.events, saves.figures) == (0, 0, [], [], [])


@given(st.integers(1, 400), st.integers(5, 60), st.integers(0, 2**32))
def test_thinning_keeps_failures_both_ends_and_whatever_stands_out(count: int, most: int, seed: int) -> None:
    rng = random.Random(seed)
    saves = [
        SaveRecord(
            time=float(number),
            step=number,
            outcome="failed" if rng.random() < 0.02 else "durable",
            stall_secs=rng.random(),
            durable_secs=rng.random(),
        )
        for number in range(count)
    ]
    kept = thinned(saves, most)
    good = [save for save in saves if save.outcome == "durable"]
    failed = [save for save in saves if save.outcome == "failed"]
    assert kept == sorted(kept, key=lambda save: save.step)
    assert [save for save in kept if save.outcome == "failed"] == failed
    assert len(kept) <= most + len(failed) + 5
    for measure in ("stall_secs", "durable_secs"):
        assert not good or max(good, key=lambda save: getattr(save, measure)) in kept
    if good:
        assert good[0] in kept
        assert good[-1] in kept


def test_a_log_of_the_most_saves_that_a_page_shows_is_not_thinned() -> None:
    saves = saves_of(list(sample_run.log_records(1, MOST_SAVES)))
    assert len(saves.columns.time) == saves.count == MOST_SAVES
