"""Retention: what stays and why, against tables that a person can read, and whatever happens to a run."""

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lastgood.errors import ConfigError
from lastgood.manager.catalog import Condition, Entry, step_name, step_of
from lastgood.manager.retention import (
    Decision,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPerTimeSpan,
    KeepSteps,
    RetentionRule,
    decide,
    parse_rule,
    rules_from_json,
    rules_to_json,
)

TABLES = Path(__file__).parent / "retention_tables"
REWRITE = "LASTGOOD_REWRITE_TABLES"
SPANS = ["hour", "day", "week", "month"]


def entry(step: int, condition: Condition = Condition.COMMITTED, **known: Any) -> Entry:
    return Entry(step=step, path=f"/run/{step_name(step)}", condition=condition, **known)


def steps(verdicts: Sequence[Any]) -> list[int]:
    return [verdict.entry.step for verdict in verdicts]


# Tables


def read_sections(text: str) -> dict[str, list[str]]:
    """The indented lines under each heading."""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            lines = sections.setdefault(heading[1], [])
        elif line.startswith("  "):
            lines.append(line.strip())
        else:
            assert not line or line.startswith("#"), f"neither a heading nor indented: {line}"
    return sections


def read_entry(line: str) -> Entry:
    name, condition, *facts = line.split()
    known = dict(fact.split("=") for fact in facts)
    at = known.pop("at", None)
    return entry(
        step_of(name) or 0,
        Condition(condition),
        saved_at=None if at is None else datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp(),
        metrics={metric: None if value == "-" else float(value) for metric, value in known.items()} or None,
    )


def written_out(decision: Decision) -> str:
    lines = ["decision:"]
    for what, verdicts in (("keep", decision.keep), ("remove", decision.remove)):
        for verdict in verdicts:
            lines += [f"  {what:<6}  {step_name(verdict.entry.step):<9}  {'; '.join(verdict.reasons)}".rstrip()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("table", sorted(TABLES.glob("*.txt")), ids=lambda table: table.stem)
def test_decisions_are_those_of_the_tables(table: Path) -> None:
    """Each table holds rules, entries and, at its end, the decision.

    After a change that is meant: ``LASTGOOD_REWRITE_TABLES=1 make test ARGS=tests/unit/manager/test_retention.py``
    writes the decisions anew; read the difference that version control shows before you believe it.
    """
    text = table.read_text()
    given_part = text.partition("decision:")[0].rstrip() + "\n\n"
    sections = read_sections(given_part)
    protected = {
        step_of(name) or 0: reason for name, reason in (line.split(None, 1) for line in sections.get("protected", []))
    }
    decision = decide(
        [read_entry(line) for line in sections["entries"]],
        [parse_rule(text) for text in sections["rules"]],
        protected=protected,
    )
    expected = given_part + written_out(decision)
    if os.environ.get(REWRITE):
        table.write_text(expected)
    difference = difflib.unified_diff(
        text.splitlines(), expected.splitlines(), "the table", "the decision", lineterm=""
    )
    assert text == expected or os.environ.get(REWRITE), "\n".join(difference)


def test_there_are_tables() -> None:
    assert len(list(TABLES.glob("*.txt"))) >= 9


# Properties

times = (
    st.none()
    | st.floats(0, 4e9)
    | st.sampled_from([-1.0, math.nan, math.inf, 1e300, 253_402_300_799.9999, 253_402_300_800.0])
)
values = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.5, 1.0])
entries_of_runs = st.lists(
    st.builds(
        entry,
        st.integers(0, 40),
        st.sampled_from([Condition.COMMITTED, *Condition]),
        saved_at=times,
        metrics=st.none() | st.dictionaries(st.sampled_from(["loss", "accuracy"]), values, max_size=2),
    ),
    max_size=15,
    unique_by=lambda each: each.step,
)
our_rules: st.SearchStrategy[RetentionRule] = st.one_of(
    st.builds(KeepLast, st.integers(1, 5)),
    st.builds(KeepEvery, st.integers(1, 12)),
    st.builds(KeepBest, st.integers(1, 4), st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"])),
    st.builds(
        KeepPerTimeSpan,
        st.sampled_from(SPANS) | st.floats(1, 1e9) | st.integers(1, 10**9),
        st.none() | st.integers(1, 4),
    ),
    st.builds(KeepSteps, st.sets(st.integers(0, 40), min_size=1, max_size=3)),
)
rule_lists = st.lists(our_rules, max_size=4)
protections = st.dictionaries(st.integers(0, 40), st.sampled_from(["saved last", "being read"]), max_size=3)


@given(entries_of_runs, rule_lists, protections)
def test_every_committed_checkpoint_is_judged_once_and_the_newest_stays(
    entries: list[Entry], rules: list[RetentionRule], protected: dict[int, str]
) -> None:
    decision = decide(entries, rules, protected=protected)
    keep, remove = steps(decision.keep), steps(decision.remove)
    committed = sorted(each.step for each in entries if each.is_committed)
    assert sorted(keep + remove) == committed
    assert keep == sorted(keep)
    assert remove == sorted(remove)
    assert keep[-1:] == committed[-1:]
    assert not set(remove) & set(protected)
    for verdict in decision.keep + decision.remove:
        assert verdict.reasons
        assert all(verdict.reasons)
        assert len(set(verdict.reasons)) == len(verdict.reasons)
    for verdict in decision.remove:
        assert f"step {committed[-1]} is newer and committed" in verdict.reasons[0]


@given(entries_of_runs, rule_lists, protections)
def test_deciding_again_on_what_was_kept_keeps_it_for_the_same_reasons(
    entries: list[Entry], rules: list[RetentionRule], protected: dict[int, str]
) -> None:
    decision = decide(entries, rules, protected=protected)
    again = decide([verdict.entry for verdict in decision.keep], rules, protected=protected)
    assert again == Decision(decision.keep, ())


@given(entries_of_runs, rule_lists, protections, st.randoms(use_true_random=False))
def test_order_and_uncommitted_entries_make_no_difference(
    entries: list[Entry], rules: list[RetentionRule], protected: dict[int, str], random: Any
) -> None:
    decision = decide(entries, rules, protected=protected)
    committed = [each for each in entries if each.is_committed]
    random.shuffle(committed)
    assert decide(committed, rules, protected=protected) == decision


@given(entries_of_runs, st.lists(our_rules, min_size=1, max_size=4), our_rules)
def test_another_rule_never_removes_more(
    entries: list[Entry], rules: list[RetentionRule], another: RetentionRule
) -> None:
    assert set(steps(decide(entries, [*rules, another]).remove)) <= set(steps(decide(entries, rules).remove))


@given(entries_of_runs, st.sampled_from(SPANS) | st.floats(1, 1e8), st.none() | st.integers(1, 4))
def test_one_checkpoint_a_span_stays_and_it_is_the_last(
    entries: list[Entry], span: str | float, count: int | None
) -> None:
    """Said again in another way: of two in one span the earlier goes, and a lone one stays."""
    timed = [each for each in entries if each.saved_at is not None and 0 <= each.saved_at < 253_402_300_800]
    timed.sort(key=lambda each: (each.saved_at, each.step))
    kept = KeepPerTimeSpan(span, count).keeps(sorted(entries, key=lambda each: each.step))
    last = [
        now.step
        for now, following in itertools.zip_longest(timed, timed[1:])
        if following is None or not same_span(span, now.saved_at or 0.0, following.saved_at or 0.0)
    ]
    assert list(kept) == (last if count is None else last[-count:])


def same_span(span: str | float, one: float, other: float) -> bool:
    a, b = datetime.fromtimestamp(int(one), UTC), datetime.fromtimestamp(int(other), UTC)
    match span:
        case "hour":
            return (a.date(), a.hour) == (b.date(), b.hour)
        case "day":
            return a.date() == b.date()
        case "week":
            return a.isocalendar()[:2] == b.isocalendar()[:2]
        case "month":
            return (a.year, a.month) == (b.year, b.month)
        case seconds:
            return one // float(seconds) == other // float(seconds)


class Run(RuleBasedStateMachine):
    """A run whose saves commit, fail or are damaged later, which goes back to lower steps, and prunes at any time.

    Removal may stop half-way, as after a kill. Whatever the order: while nothing damages it, the newest committed
    checkpoint is there, and so is the one that was saved last.
    """

    @initialize(rules=rule_lists)
    def open(self, rules: list[RetentionRule]) -> None:
        self.rules = rules
        self.entries: dict[int, Entry] = {}
        self.step = 0
        self.time = 1.7e9
        self.newest: int | None = None
        self.saved_last: int | None = None

    def committed(self) -> list[int]:
        return sorted(step for step, each in self.entries.items() if each.is_committed)

    @rule(
        by=st.integers(1, 7),
        hours=st.integers(0, 40),
        condition=st.sampled_from([Condition.COMMITTED, Condition.COMMITTED, Condition.UNFINISHED]),
        loss=values,
    )
    def save(self, by: int, hours: int, condition: Condition, loss: float | None) -> None:
        self.step += by
        self.time += 3600 * hours
        if self.step in self.committed() and condition is not Condition.COMMITTED:
            return  # saved before the run went back; a save that fails leaves that one as it was
        self.entries[self.step] = entry(self.step, condition, saved_at=self.time, metrics={"loss": loss})
        if condition is Condition.COMMITTED:
            self.saved_last = self.step
            self.newest = max(self.step, self.newest or 0)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), condition=st.sampled_from([Condition.DAMAGED, Condition.UNREADABLE, Condition.FOREIGN]))
    def damage(self, data: st.DataObject, condition: Condition) -> None:
        step = data.draw(st.sampled_from(sorted(self.entries)))
        self.entries[step] = msgspec.structs.replace(self.entries[step], condition=condition, problem="a flipped bit")
        self.newest = max(self.committed(), default=None)
        if step == self.saved_last:
            self.saved_last = None

    @precondition(lambda self: self.committed())
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        self.step = data.draw(st.sampled_from(self.committed()))

    @rule(data=st.data(), killed=st.booleans())
    def prune(self, data: st.DataObject, killed: bool) -> None:
        protected = {} if self.saved_last is None else {self.saved_last: "saved last"}
        removable = steps(decide(list(self.entries.values()), self.rules, protected=protected).remove)
        for step in removable[: data.draw(st.integers(0, len(removable))) if killed else None]:
            assert self.entries[step].is_committed
            del self.entries[step]

    @invariant()
    def the_last_good_ones_are_there(self) -> None:
        committed = self.committed()
        assert committed[-1:] == ([] if self.newest is None else [self.newest])
        assert self.saved_last is None or self.saved_last in committed


TestRun = Run.TestCase


@pytest.mark.parametrize("mode", ["min", "max"])
def test_values_that_are_not_finite_are_never_the_best(mode: Any) -> None:
    found = [math.nan, math.inf, 1.5, -math.inf, math.nan, None]
    entries = [entry(step, metrics={"loss": value}) for step, value in enumerate(found)]
    assert list(KeepBest(3, "loss", mode).keeps(entries)) == [2]


# Rules of others


class KeepOdd:
    """A rule that somebody wrote for a run of their own."""

    def keeps(self, entries: Sequence[Entry]) -> Mapping[int, str]:
        return {each.step: "odd" for each in entries if each.step % 2} | {1001: "not there at all"}

    def __repr__(self) -> str:
        return "KeepOdd()"


def test_a_rule_is_anything_that_says_what_it_keeps() -> None:
    decision = decide([entry(step) for step in range(1, 5)], [KeepOdd()])
    assert [(verdict.entry.step, verdict.reasons) for verdict in decision.keep] == [
        (1, ("odd",)),
        (3, ("odd",)),
        (4, ("the newest",)),
    ]


def test_rules_see_committed_entries_in_rising_order_and_no_others() -> None:
    seen: list[int] = []

    class Watching:
        def keeps(self, entries: Sequence[Entry]) -> Mapping[int, str]:
            seen.extend(each.step for each in entries)
            return {}

    decide([entry(3), entry(1), entry(2, Condition.DAMAGED), entry(0)], [Watching()])
    assert seen == [0, 1, 3]


@pytest.mark.parametrize("rules", [[3], ["last=3"], [None]])
def test_what_is_no_rule_is_refused_even_before_there_are_checkpoints(rules: list[Any]) -> None:
    with pytest.raises(ConfigError, match="not a retention rule"):
        decide([], rules)


def test_two_entries_of_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="same step"):
        decide([entry(1), entry(2), entry(1, Condition.DAMAGED)], [KeepLast(1)])


# Rules as text and as JSON


@given(rule_lists)
def test_rules_come_back_from_json(rules: list[RetentionRule]) -> None:
    assert rules_from_json(json.loads(json.dumps(rules_to_json(rules)))) == rules


def test_rules_in_json_are_readable() -> None:
    assert rules_to_json([KeepLast(3), KeepBest(2, "loss"), KeepSteps([20, 10, 20])]) == [
        {"rule": "keep last", "count": 3},
        {"rule": "keep best", "count": 2, "metric": "loss", "mode": "min"},
        {"rule": "keep steps", "steps": (10, 20)},
    ]


@pytest.mark.parametrize(
    "value",
    [
        [{"rule": "keep everything"}],
        [{"rule": "keep last", "count": 0}],
        [{"rule": "keep last"}],
        [{"rule": "keep last", "count": 1, "and": "more"}],
        [{"count": 1}],
        [{"rule": "keep steps", "steps": []}],
        [3],
        3,
        None,
        rules_to_json([KeepLast(3), KeepOdd()]),
    ],
)
def test_a_rule_that_is_not_understood_is_never_left_out(value: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        rules_from_json(value)


def test_a_rule_of_somebody_else_is_described() -> None:
    assert rules_to_json([KeepOdd()]) == [{"rule": "KeepOdd", "is": "KeepOdd()"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last=3", KeepLast(3)),
        ("every=1000", KeepEvery(1000)),
        ("best=2:loss", KeepBest(2, "loss", "min")),
        ("best=2:loss:max", KeepBest(2, "loss", "max")),
        ("best=1:val:top:5:max", KeepBest(1, "val:top:5", "max")),
        ("best=1:max:max", KeepBest(1, "max", "max")),
        ("per=day", KeepPerTimeSpan("day")),
        ("per=day:7", KeepPerTimeSpan("day", 7)),
        ("per=3600s", KeepPerTimeSpan(3600.0)),
        ("per=1.5s:5", KeepPerTimeSpan(1.5, 5)),
        ("step=5000", KeepSteps([5000])),
    ],
)
def test_rules_as_text(text: str, expected: RetentionRule) -> None:
    assert parse_rule(text) == expected


@pytest.mark.parametrize(
    "text",
    # The last ones would rank a metric that no checkpoint has, and so keep nothing.
    ["", "last", "last=", "last=0", "last=x", "last=1:2", "every=-5", "best=3", "best=3:", "best=x:loss", "per=",
     "per=days", "per=fortnight", "per=0s", "per=nans", "per=infs", "per=day:0", "per=day:x", "step=-1", "step=x",
     "keep=3", "best=2:loss:mim", "best=2:min", "best=2:val:loss"],
)  # fmt: skip
def test_text_that_is_no_rule_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(repr(text))} is not a rule"):
        parse_rule(text)


@given(st.text(max_size=20) | st.from_regex(r"(last|every|best|per|step)=[0-9:a-z.]*", fullmatch=True))
def test_any_text_is_a_rule_or_a_mistake(text: str) -> None:
    try:
        parsed = parse_rule(text)
    except ConfigError:
        return
    assert rules_from_json(rules_to_json([parsed])) == [parsed]


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3", None])
def test_counts_that_are_none_are_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        KeepLast(count)
    with pytest.raises(ConfigError, match="whole number"):
        KeepEvery(count)
    with pytest.raises(ConfigError, match="whole number"):
        KeepBest(count, "loss")
    if count is not None:
        with pytest.raises(ConfigError, match="whole number"):
            KeepPerTimeSpan("day", count)


@pytest.mark.parametrize("span", ["fortnight", "", 0, 0.5, -1, math.nan, math.inf, True, None])
def test_spans_that_are_none_are_refused(span: Any) -> None:
    with pytest.raises(ConfigError, match="span"):
        KeepPerTimeSpan(span)


@pytest.mark.parametrize("pinned", [[], [-1], ["5"], "5", 5, None, [1.0], [True]])
def test_steps_that_are_none_are_refused(pinned: Any) -> None:
    with pytest.raises(ConfigError, match="KeepSteps"):
        KeepSteps(pinned)


@pytest.mark.parametrize("metric", ["", None, 3])
def test_a_metric_needs_a_name(metric: Any) -> None:
    with pytest.raises(ConfigError, match="metric"):
        KeepBest(1, metric)


@pytest.mark.parametrize("mode", ["best", "", None])
def test_a_metric_is_best_at_one_of_its_ends(mode: Any) -> None:
    with pytest.raises(ConfigError, match="mode"):
        KeepBest(1, "loss", mode)
