"""What the page says of checkpoints that stay, go, have gone or do not count; and of the run's health."""

from tests.report import sample_run

from lastgood.cli._report.data import Report
from lastgood.cli._report.health import health_of
from lastgood.cli._report.retention import retention_of
from lastgood.cli._report.words import rule_in_words
from lastgood.manager.catalog import Catalog, Condition, Entry
from lastgood.manager.run_log import RestoreRecord, RunRecord, SaveRecord


def _catalog(*conditions: Condition, others: tuple[str, ...] = ()) -> Catalog:
    entries = [
        Entry(step=10 * place, path=f"/run/step-{10 * place}", condition=condition, problem="p", nbytes=7)
        for place, condition in enumerate(conditions, 1)
    ]
    return Catalog("/run", tuple(entries), others)


def _run(rules: list[dict[str, object]]) -> RunRecord:
    return RunRecord(time=1.0, pid=1, host="h", world_size=1, rules=rules, lastgood="0.1")


def test_each_checkpoint_has_its_fate_and_all_its_reasons(report: Report) -> None:
    rows = {row.step: row for row in report.retention.checkpoints}
    losses = {step: row.metrics["loss"] for step, row in rows.items() if row.condition == "committed"}
    stays = {1000, 2000, 2980, 2990, 3000, *sorted(losses, key=lambda step: losses[step])[:2]}
    assert {step for step, row in rows.items() if row.fate == "stays"} == stays
    assert {step for step, row in rows.items() if row.fate == "goes"} == set(sample_run.KEPT) - stays
    assert [step for step, row in rows.items() if row.fate == "not counted"] == [sample_run.UNFINISHED]
    assert {"one of the last 3", "every 1000 steps", "the newest", "saved last"} <= set(rows[3000].reasons)


def test_the_lanes_are_the_rules_steps_and_what_has_gone(report: Report) -> None:
    lanes = {lane.label: lane for lane in report.retention.lanes}
    assert lanes["keep last (count 3)"].steps == [2980, 2990, 3000]
    assert lanes["keep every (steps 1000)"].steps == [1000, 2000, 3000]
    assert len(lanes["keep best (count 2, metric loss, mode min)"].steps) == 2
    assert lanes["save failed"].steps == [770, 780, 2030]
    assert 100 in lanes["removed"].steps
    assert set(lanes["removed"].steps).isdisjoint(lanes["there now"].steps)


def test_what_was_set_aside_is_there_with_the_reason_from_the_log(report: Report) -> None:
    (row,) = report.retention.set_aside
    assert row.name == "step-2380.set-aside"
    assert "does not match its checksum" in row.problem


def test_rules_of_the_newest_run_count() -> None:
    catalog = _catalog(*[Condition.COMMITTED] * 3)
    old, new = _run([{"rule": "keep last", "count": 3}]), _run([{"rule": "keep last", "count": 1}])
    fates = [row.fate for row in retention_of(catalog, [old, new]).checkpoints]
    assert fates == ["goes", "goes", "stays"]


def test_rules_that_nobody_here_knows_are_shown_and_nothing_is_said_to_go() -> None:
    retention = retention_of(_catalog(*[Condition.COMMITTED] * 3), [_run([{"rule": "Mine", "is": "Mine(3)"}])])
    assert retention.rules == ["Mine (is Mine(3))"]
    assert retention.problem is not None
    assert {row.fate for row in retention.checkpoints} == {"stays"}


def test_without_a_log_nothing_goes_and_the_page_says_that_no_rules_are_known() -> None:
    retention = retention_of(_catalog(Condition.COMMITTED, Condition.COMMITTED), [])
    assert "names no rules" in (retention.problem or "")
    assert {row.fate for row in retention.checkpoints} == {"stays"}


def test_what_was_saved_last_stays_after_a_return_to_an_earlier_step() -> None:
    saved = SaveRecord(time=2.0, step=10, outcome="durable", stall_secs=0.1)
    records = [_run([{"rule": "keep last", "count": 1}]), saved]
    rows = retention_of(_catalog(*[Condition.COMMITTED] * 3), records).checkpoints
    assert [(row.step, row.fate) for row in rows] == [(10, "stays"), (20, "goes"), (30, "stays")]


def test_what_the_run_resumed_from_stays_until_there_is_a_later_save_as_retention_has_it() -> None:
    catalog = _catalog(*[Condition.COMMITTED] * 3)
    log = [
        _run([{"rule": "keep last", "count": 1}]),
        SaveRecord(time=2.0, step=30, outcome="durable", stall_secs=0.1),
        RestoreRecord(time=3.0, step=10, seconds=0.1),
    ]
    assert [row.fate for row in retention_of(catalog, log).checkpoints] == ["stays", "goes", "stays"]


def test_health_is_told_in_sentences_and_bad_when_something_is_damaged() -> None:
    health = health_of(_catalog(Condition.COMMITTED, Condition.DAMAGED, Condition.UNFINISHED, Condition.FOREIGN))
    assert not health.is_good
    assert health.sentences == [
        "1 checkpoint is committed; a training that resumes now goes on from step 10.",
        "1 checkpoint cannot be what was written: step 20.",
        "1 save never came to an end, or is still under way.",
        "1 checkpoint lastgood did not write.",
    ]
    assert (health.latest_step, health.nbytes) == (10, 7)


def test_health_without_any_checkpoint_says_that_a_training_begins_from_nothing() -> None:
    health = health_of(_catalog(Condition.UNREADABLE, others=("step-1.set-aside",)))
    assert not health.is_good
    assert health.sentences[0] == "No checkpoint is committed: a training that starts now begins from nothing."
    assert health.sentences[1:] == [
        "1 checkpoint cannot be read at all.",
        "1 damaged checkpoint was set aside by a resume.",
    ]


def test_a_long_list_in_a_rule_is_cut() -> None:
    assert rule_in_words({"rule": "keep steps", "steps": list(range(20))}).endswith("8, 9, ...)")
    assert rule_in_words({}) == "a rule without a name"
