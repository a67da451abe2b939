"""``lastgood ls``: which checkpoints a run has."""

import os
import time
from typing import Annotated

import msgspec
import typer

from lastgood.cli._disk import disk_size, identity_of, is_one_checkpoint
from lastgood.cli._output import AsJson, Output, human_age, human_bytes, human_moment, human_time
from lastgood.errors import CheckpointNotFoundError, StorageError
from lastgood.format.manifest import checkpoint_file
from lastgood.manager.catalog import (
    RUN_LOG_NAME,
    Catalog,
    Condition,
    Entry,
    is_set_aside,
    read_catalog,
    read_entry_at,
    step_of,
)
from lastgood.manager.run_log import SaveRecord, read_run_log
from lastgood.storage.base import StorageBackend
from lastgood.storage.local import LocalStorage

_COLUMNS = ("", "step", "condition", "size", "saved", "age", "ranks", "durable in", "metrics")
_STYLES = {Condition.COMMITTED: None, Condition.FOREIGN: "dim"}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint. ``step`` is ``None`` where neither its name nor its file tells it."""

    step: int | None
    path: str
    condition: Condition
    problem: str | None
    latest: bool
    world_size: int | None
    nbytes: int
    saved_at: float | None
    metrics: dict[str, float | None] | None
    save_id: str | None
    durable_secs: float | None = None


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ls`` knows. ``nbytes`` is what all the checkpoints in ``steps`` take together."""

    path: str
    steps: list[Row]
    latest: int | None
    nbytes: int
    set_aside: list[str] = []
    others: list[str] = []


def ls(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="A run's directory, or one checkpoint of whatever name.")],
    everything: Annotated[bool, typer.Option("--all", help="Name what is not lastgood's, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run: condition, size, age, metrics.

    A star marks the latest that counts. "committed" means that the commit record is there and fits; whether every byte
    is right, 'lastgood verify' finds out. Times of saving come from the run's log, if there is one.

    \b
    Example:
      lastgood ls runs/gpt
      lastgood ls runs/gpt --json | jq '.steps[] | select(.condition != "committed")'
    """
    storage = LocalStorage()
    listing = _list_one(storage, root) if is_one_checkpoint(storage, root) else _list_run(storage, root)
    output = Output(as_json)
    output.json(listing)
    _show(output, listing, everything=everything, now=time.time())


def _list_run(storage: StorageBackend, root: str) -> Listing:
    catalog = read_catalog(storage, root)
    set_aside = [name for name in catalog.others if is_set_aside(name)]
    if not catalog.entries and not set_aside:
        raise _nothing_there(catalog)
    latest = catalog.committed[-1].step if catalog.committed else None
    durable = _durable_times(storage, root)
    steps = [
        _row(entry, step=entry.step, latest=entry.step == latest, durable_secs=durable.get(entry.step))
        for entry in catalog.entries
    ]
    return Listing(
        path=root,
        steps=steps,
        latest=latest,
        nbytes=sum(row.nbytes for row in steps),
        set_aside=set_aside,
        others=[name for name in catalog.others if name not in set_aside and name != RUN_LOG_NAME],
    )


def _nothing_there(catalog: Catalog) -> CheckpointNotFoundError:
    root = catalog.root
    if not os.path.exists(root):
        return CheckpointNotFoundError(f"there is no directory {root}", path=root)
    what = (
        f"none of the {len(catalog.others)} names in it is" if catalog.others else "it is empty; there is no name in it"
    )
    return CheckpointNotFoundError(f"no checkpoint is under {root}: {what} that of a step (step-1000).", path=root)


def _list_one(storage: StorageBackend, path: str) -> Listing:
    """The listing of a checkpoint that was named itself, with the step that its name tells, or else its file."""
    is_file = os.path.isfile(path)
    step = None if is_file else step_of(os.path.basename(os.path.normpath(path)))
    identity = identity_of(storage, path if is_file else checkpoint_file(path, 0))
    if step is None and identity is not None:
        step = identity.step
    if not is_file:
        entry = read_entry_at(storage, path, step or 0)
    elif identity is None:
        problem = "lastgood did not write it, or it is damaged beyond recognition"
        entry = Entry(step=0, path=path, condition=Condition.FOREIGN, problem=problem)
    else:
        alone = identity.world_size == 1 or identity.independent
        entry = Entry(
            step=0,
            path=path,
            condition=Condition.COMMITTED if alone else Condition.UNFINISHED,
            problem=None if alone else f"rank {identity.rank}'s part of a checkpoint of {identity.world_size} ranks",
            world_size=identity.world_size,
            nbytes=identity.size,
            saved_at=identity.saved_at,
            metrics=identity.metrics,
            save_id=identity.save_id,
        )
    row = _row(entry, step=step, latest=False, durable_secs=None)
    return Listing(path=path, steps=[row], latest=None, nbytes=row.nbytes)


def _row(entry: Entry, *, step: int | None, latest: bool, durable_secs: float | None) -> Row:
    return Row(
        step=step,
        path=entry.path,
        condition=entry.condition,
        problem=entry.problem,
        latest=latest,
        world_size=entry.world_size,
        nbytes=entry.nbytes or disk_size(entry.path),
        saved_at=entry.saved_at,
        metrics=entry.metrics,
        save_id=entry.save_id,
        durable_secs=durable_secs,
    )


def _durable_times(storage: StorageBackend, root: str) -> dict[int, float]:
    """How long each step's last save took until it was durable, as far as the run's log tells."""
    try:
        records = read_run_log(storage, root)
    except StorageError:  # 'doctor' has more to say about that
        return {}
    return {
        record.step: record.durable_secs
        for record in records
        if isinstance(record, SaveRecord) and record.durable_secs is not None
    }


def _show(output: Output, listing: Listing, *, everything: bool, now: float) -> None:
    output.table(
        _COLUMNS,
        [_cells(row, now) for row in listing.steps],
        right=("step", "size", "age", "ranks", "durable in"),
        styles=[_STYLES.get(row.condition, "red") for row in listing.steps],
    )
    for name in listing.set_aside:
        output.print(f"set aside: {name}", style="yellow")
    for name in listing.others if everything else ():
        output.print(f"not lastgood's: {name}", style="dim")
    output.print(_totals(listing, everything=everything))
    if listing.set_aside or any(row.condition is not Condition.COMMITTED for row in listing.steps):
        problems = [row for row in listing.steps if row.problem is not None]
        if listing.latest is None and len(listing.steps) == len(problems) == 1:
            output.print(f"{problems[0].path}: {problems[0].problem}")
        else:
            output.print(f"Not everything here is a good checkpoint: 'lastgood doctor {listing.path}' explains.")


def _cells(row: Row, now: float) -> list[str]:
    return [
        "*" if row.latest else "",
        os.path.basename(row.path) if row.step is None else str(row.step),
        row.condition.value,
        human_bytes(row.nbytes),
        "" if row.saved_at is None else human_moment(row.saved_at),
        "" if row.saved_at is None else human_age(row.saved_at, now),
        "" if row.world_size is None else str(row.world_size),
        "" if row.durable_secs is None else human_time(row.durable_secs),
        " ".join(
            f"{name}={'?' if value is None else format(value, '.6g')}" for name, value in (row.metrics or {}).items()
        ),
    ]


def _totals(listing: Listing, *, everything: bool) -> str:
    committed = sum(row.condition is Condition.COMMITTED for row in listing.steps)
    text = f"{committed} committed checkpoint{'' if committed == 1 else 's'}"
    if committed < len(listing.steps):
        text += f", {len(listing.steps) - committed} not"
    text += f"; {human_bytes(listing.nbytes)} in all"
    if listing.others and not everything:
        text += f"; {len(listing.others)} other name{'' if len(listing.others) == 1 else 's'} (--all shows them)"
    return text
