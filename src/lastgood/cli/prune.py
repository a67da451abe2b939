"""``lastgood prune``: remove the checkpoints that no rule keeps, and what killed saves have left."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer

from lastgood.cli._disk import Root, disk_size, is_one_checkpoint, require_directory
from lastgood.cli._output import AsJson, Output, human_bytes
from lastgood.errors import ConfigError
from lastgood.manager import removal
from lastgood.manager.bookkeeping import removal_record
from lastgood.manager.catalog import RUN_LOG_NAME, Entry
from lastgood.manager.retention import RetentionRule, Verdict, parse_rule, rules_from_json, rules_to_json
from lastgood.manager.run_log import (
    Record,
    RunRecord,
    append_record,
    end_torn_line,
    protected_by,
    read_run_log,
)
from lastgood.manager.verification import require_good
from lastgood.storage.base import StorageBackend
from lastgood.storage.local import LocalStorage


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint, or what a killed save has left of one, and why it goes or stays."""

    step: int
    path: str
    nbytes: int
    reasons: list[str]


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """What ``prune`` did or, with ``dry_run``, would do.

    ``cleared`` are the leftovers of saves that never finished; ``skipped`` could not go this time. ``nbytes_freed``
    counts what is in ``removed`` and ``cleared``.
    """

    path: str
    dry_run: bool
    rules: list[dict[str, Any]]
    kept: list[Judged]
    removed: list[Judged]
    cleared: list[Judged]
    skipped: list[Judged]
    nbytes_freed: int


def prune(
    root: Root,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="A reason to keep checkpoints; several add up. Without any, the run's own."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this, only say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints that no rule keeps, and what killed saves have left behind.

    It only says what would go, and why, unless you add --yes. A checkpoint goes only if a newer one is committed; the
    newest one always stays (with --yes, every byte of it is verified before anything goes), and so does everything
    whose name is not exactly lastgood's.

    \b
    Rules:
      last=3             the three newest
      every=1000         each step that is a multiple of 1000
      best=2:loss:min    the two with the smallest "loss" (or max)
      per=day:7          the last of each day, for the seven newest days
                         (hour, day, week, month, or seconds such as 3600s)
      step=5000          this one
    \b
    Example:
      lastgood prune runs/gpt --keep last=3 --keep best=1:loss:min
      lastgood prune runs/gpt --keep last=3 --keep best=1:loss:min --yes
    """
    storage = LocalStorage()
    require_directory(root)
    if is_one_checkpoint(storage, root):
        raise ConfigError(f"{root} is a single checkpoint, not the directory of a run. Nothing was removed.", path=root)
    records = read_run_log(storage, root)
    rules = [parse_rule(text) for text in keep] if keep else _rules_of_the_run(root, records)
    pruning = _prune(storage, root, rules, protected_by(records), dry_run=not yes)
    output = Output(as_json)
    output.json(pruning)
    _show(output, pruning)
    if yes and pruning.skipped:
        raise typer.Exit(1)


def _rules_of_the_run(root: str, records: Sequence[Record]) -> list[RetentionRule]:
    runs = [record for record in records if isinstance(record, RunRecord)]
    if not runs:
        raise ConfigError(
            f"no rule says what to keep under {root}: there is no log of a run that would name some. Name them: --keep "
            "last=3, or see 'lastgood prune --help'. Nothing was removed.",
            path=root,
        )
    return rules_from_json(runs[-1].rules)


def _prune(
    storage: StorageBackend, root: str, rules: Sequence[RetentionRule], protected: dict[int, str], *, dry_run: bool
) -> Pruning:
    planned = removal.prune(storage, root, rules, protected=protected, dry_run=True)
    sizes = {entry.path: disk_size(entry.path) for entry in planned.leftovers}
    report = (
        planned
        if dry_run
        else removal.prune(storage, root, rules, protected=protected, dry_run=False, check=require_good)
    )
    if not dry_run:
        _note(storage, root, report)
    cleared = [_judged(entry, sizes.get(entry.path, 0), _why(entry)) for entry in report.leftovers]
    return Pruning(
        path=root,
        dry_run=dry_run,
        rules=rules_to_json(rules),
        kept=_all_judged(report.decision.keep),
        removed=_all_judged(report.removed),
        cleared=cleared,
        skipped=[_judged(entry, entry.nbytes or disk_size(entry.path), [why]) for entry, why in report.skipped],
        nbytes_freed=report.nbytes_freed + sum(leftover.nbytes for leftover in cleared),
    )


def _judged(entry: Entry, nbytes: int, reasons: Sequence[str]) -> Judged:
    return Judged(step=entry.step, path=entry.path, nbytes=nbytes, reasons=list(reasons))


def _all_judged(verdicts: Sequence[Verdict]) -> list[Judged]:
    return [_judged(verdict.entry, verdict.entry.nbytes, verdict.reasons) for verdict in verdicts]


def _why(leftover: Entry) -> list[str]:
    parts = f", with the files of {leftover.world_size} ranks or fewer" if (leftover.world_size or 1) > 1 else ""
    return [f"left behind by a save that never finished{parts}"]


def _note(storage: StorageBackend, root: str, report: removal.PruneReport) -> None:
    """Tell the run's log, if there is one, what its report would otherwise miss."""
    if report.removed and storage.exists(os.path.join(root, RUN_LOG_NAME)):
        end_torn_line(storage, root)
        append_record(storage, root, removal_record(report))


def _show(output: Output, pruning: Pruning) -> None:
    dry = pruning.dry_run
    groups = (
        ("keep" if dry else "kept", None, pruning.kept),
        ("would remove" if dry else "removed", "red", pruning.removed),
        ("would clear" if dry else "cleared", "yellow", pruning.cleared),
        ("leave alone" if dry else "left alone", "yellow", pruning.skipped),
    )
    lines = [(one, word, style) for word, style, several in groups for one in several]
    lines.sort(key=lambda line: line[0].step)
    output.table(
        ("step", "", "size", "why"),
        [(str(one.step), word, human_bytes(one.nbytes), "; ".join(one.reasons)) for one, word, _ in lines],
        right=("step", "size"),
        styles=[style for _, _, style in lines],
    )
    output.print(_summary(pruning))


def _summary(pruning: Pruning) -> str:
    gone = len(pruning.removed) + len(pruning.cleared)
    kept = f"{len(pruning.kept)} checkpoint{'' if len(pruning.kept) == 1 else 's'}"
    if not gone:
        return f"There is nothing to remove under {pruning.path}; {kept} kept."
    amount = f"{len(pruning.removed)} removed, {len(pruning.cleared)} cleared away, {kept} kept"
    freed = human_bytes(pruning.nbytes_freed)
    if pruning.dry_run:
        return f"With --yes: {amount}, {freed} freed. Nothing has been changed."
    return f"{amount}, {freed} freed."
