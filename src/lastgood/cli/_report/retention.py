"""Which checkpoints are there and why, and which have gone."""

from collections.abc import Mapping, Sequence

from lastgood.cli._report.data import CheckpointRow, Lane, RemovedRow, Retention, SetAsideRow
from lastgood.cli._report.words import printable, rule_in_words
from lastgood.errors import ConfigError
from lastgood.manager.catalog import Catalog, Entry, is_set_aside
from lastgood.manager.retention import Decision, RetentionRule, decide, rules_from_json
from lastgood.manager.run_log import Record, RemoveRecord, RunRecord, SaveRecord, SetAsideRecord, protected_by

_MOST_REMOVED = 2_000
_NO_RULES = "The run's log names no rules: no manager has noted any here. Nothing is removed without rules."


def retention_of(catalog: Catalog, records: Sequence[Record]) -> Retention:
    """The present catalog under the rules of the newest run, and what the log says of removals."""
    noted = next((record.rules for record in reversed(records) if isinstance(record, RunRecord)), None)
    rules, problem = _rules(noted)
    decision = (
        decide(catalog.entries, rules, protected=protected_by(records, saved="saved last")) if problem is None else None
    )
    removed = _removed(records)
    return Retention(
        rules=[rule_in_words(rule) for rule in noted or ()],
        problem=problem,
        checkpoints=[_row(entry, decision) for entry in catalog.entries],
        lanes=_lanes(catalog, rules, noted or (), removed, records),
        removed=removed[-_MOST_REMOVED:],
        removed_count=len(removed),
        set_aside=_set_aside(catalog, records),
    )


def _rules(noted: Sequence[Mapping[str, object]] | None) -> tuple[list[RetentionRule], str | None]:
    if noted is None:
        return [], _NO_RULES
    try:
        return rules_from_json(noted), None
    except ConfigError as error:
        return [], printable(str(error))


def _row(entry: Entry, decision: Decision | None) -> CheckpointRow:
    fate, reasons = _fate(entry, decision)
    return CheckpointRow(
        step=entry.step,
        condition=entry.condition.value,
        saved_at=entry.saved_at,
        nbytes=entry.nbytes,
        ranks=entry.world_size,
        metrics={printable(name): value for name, value in (entry.metrics or {}).items()},
        fate=fate,
        reasons=[printable(reason) for reason in reasons],
    )


def _fate(entry: Entry, decision: Decision | None) -> tuple[str, Sequence[str]]:
    if not entry.is_committed:
        return "not counted", (entry.problem or entry.condition.value,)
    if decision is None:
        return "stays", ("the rules are not known",)
    for fate, verdicts in (("stays", decision.keep), ("goes", decision.remove)):
        for verdict in verdicts:
            if verdict.entry.step == entry.step:
                return fate, verdict.reasons
    raise LookupError(f"no verdict on step {entry.step}")


def _lanes(
    catalog: Catalog,
    rules: Sequence[RetentionRule],
    noted: Sequence[Mapping[str, object]],
    removed: Sequence[RemovedRow],
    records: Sequence[Record],
) -> list[Lane]:
    committed = catalog.committed
    failed = {record.step for record in records if isinstance(record, SaveRecord) and record.outcome == "failed"}
    there = [entry.step for entry in committed]
    lanes = [Lane(label="there now", kind="there", steps=there)]
    lanes += [
        Lane(label=rule_in_words(words), kind="rule", steps=sorted(rule.keeps(committed)))
        for rule, words in zip(rules, noted, strict=False)
    ]
    lanes.append(Lane(label="removed", kind="removed", steps=sorted({row.step for row in removed} - set(there))))
    lanes.append(Lane(label="save failed", kind="failed", steps=sorted(failed - set(there))))
    return [lane for lane in lanes if lane.steps or lane.kind in ("there", "rule")]


def _removed(records: Sequence[Record]) -> list[RemovedRow]:
    return [
        RemovedRow(step=gone.step, time=record.time, reasons=[printable(reason) for reason in gone.reasons])
        for record in records
        if isinstance(record, RemoveRecord)
        for gone in record.removed
    ]


def _set_aside(catalog: Catalog, records: Sequence[Record]) -> list[SetAsideRow]:
    told = {record.name: record for record in records if isinstance(record, SetAsideRecord)}
    rows = []
    for name in catalog.others:
        if is_set_aside(name):
            record = told.get(name)
            problem = "the run's log does not tell why" if record is None else record.problem
            rows.append(SetAsideRow(name=name, time=record.time if record else None, problem=printable(problem)))
    return rows
