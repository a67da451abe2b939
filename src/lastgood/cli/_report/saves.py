"""The time line of the saves, from the run's log."""

import math
from collections.abc import Callable, Iterator, Sequence

from lastgood.cli._report.data import Figure, RunEvent, SaveColumns, Saves
from lastgood.cli._report.words import printable, seconds_in_words
from lastgood.manager.run_log import Record, RestoreRecord, RunRecord, SaveRecord, SetAsideRecord

MOST_SAVES = 10_000
"""A page shows this many saves; of a longer run, those that stand out in each stretch of it."""

_MOST_FAILURES = 1_000
_MOST_EVENTS = 2_000


def saves_of(records: Sequence[Record]) -> Saves:
    """What the log says of saves, starts and resumes. Failures beyond the last thousand are only counted."""
    saves = [record for record in records if isinstance(record, SaveRecord)]
    runs = sum(isinstance(record, RunRecord) for record in records)
    return Saves(
        count=len(saves),
        failures=sum(record.outcome == "failed" for record in saves),
        restarts=max(0, runs - 1),
        columns=_columns(thinned(saves)),
        events=list(_events(records))[-_MOST_EVENTS:],
        figures=list(_figures(saves)),
    )


def thinned(saves: Sequence[SaveRecord], most: int = MOST_SAVES) -> list[SaveRecord]:
    """At most some ``most`` of the saves, in order: failures (the last thousand), and of each stretch the slowest.

    Whatever stands out in the whole is there: the longest stall and the longest way to durable are those of all.
    """
    if len(saves) <= most:
        return list(saves)
    failed = [position for position, record in enumerate(saves) if record.outcome == "failed"][-_MOST_FAILURES:]
    good = [position for position, record in enumerate(saves) if record.outcome != "failed"]
    kept = {*failed, *good[:1], *good[-1:]}
    stretch = math.ceil(3 * len(good) / most)
    measures: tuple[Callable[[int], float], ...] = (
        lambda position: saves[position].stall_secs,
        lambda position: saves[position].staged_secs or 0.0,
        lambda position: saves[position].durable_secs or 0.0,
    )
    for start in range(0, len(good), max(1, stretch)):
        kept.update(max(good[start : start + stretch], key=measure) for measure in measures)
    return [saves[position] for position in sorted(kept)]


def _columns(saves: Sequence[SaveRecord]) -> SaveColumns:
    failed = [position for position, record in enumerate(saves) if record.outcome == "failed"]
    return SaveColumns(
        time=[round(record.time, 3) for record in saves],
        step=[record.step for record in saves],
        stall=[_rounded(record.stall_secs) for record in saves],
        staged=[_rounded_or_none(record.staged_secs) for record in saves],
        durable=[_rounded_or_none(record.durable_secs) for record in saves],
        nbytes=[record.nbytes for record in saves],
        failed=failed,
        errors=[printable(saves[position].error or "no reason was noted") for position in failed],
    )


def _events(records: Sequence[Record]) -> Iterator[RunEvent]:
    step, is_first = 0, True
    for record in records:
        if isinstance(record, SaveRecord):
            step = record.step
        elif isinstance(record, RunRecord):
            words = f"{'Started' if is_first else 'Started again'} on {record.host}, process {record.pid}"
            yield RunEvent(kind="start" if is_first else "restart", time=record.time, step=step, words=printable(words))
            is_first = False
        elif isinstance(record, RestoreRecord):
            yield _resume(record, step)
            step = step if record.step is None else record.step
        elif isinstance(record, SetAsideRecord):
            words = printable(f"Step {record.step} was set aside as {record.name}: {record.problem}")
            yield RunEvent(kind="set aside", time=record.time, step=record.step, words=words)


def _resume(record: RestoreRecord, step: int) -> RunEvent:
    if record.step is None:
        words = "Looked for a checkpoint to go on from: there was none"
    else:
        words = f"Went on from step {record.step}, read in {seconds_in_words(record.seconds)}"
    if record.passed_over:
        words += ", passing over step " + ", ".join(str(passed.step) for passed in record.passed_over)
    return RunEvent(kind="resume", time=record.time, step=step if record.step is None else record.step, words=words)


def _figures(saves: Sequence[SaveRecord]) -> Iterator[Figure]:
    measures: list[tuple[str, str, list[float | int | None]]] = [
        ("Stall of training", "secs", [record.stall_secs for record in saves]),
        ("Until staged", "secs", [record.staged_secs for record in saves]),
        ("Until durable", "secs", [record.durable_secs for record in saves]),
        ("Size", "bytes", [record.nbytes for record in saves]),
    ]
    phases = sorted({name for record in saves for name in record.phases})
    measures += [(f"Phase: {name}", "secs", [record.phases.get(name) for record in saves]) for name in phases[:30]]
    for name, unit, noted in measures:
        values = sorted(value for value in noted if value is not None and math.isfinite(value))
        if values:
            yield Figure(
                name=printable(name),
                unit=unit,
                count=len(values),
                median=_rounded(_quantile(values, 0.5)),
                p95=_rounded(_quantile(values, 0.95)),
                largest=_rounded(values[-1]),
            )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that this share of all values does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _rounded(value: float) -> float:
    """Six digits are more than the page shows, and a third of what Python would write."""
    return float(f"{value:.6g}") if abs(value) < 1e6 else float(value)


def _rounded_or_none(value: float | None) -> float | None:
    return None if value is None else _rounded(value)
