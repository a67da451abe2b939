"""The edge of the report: looks at a run's root and calls the functions that make data of what is there."""

import os
import time
from dataclasses import dataclass

from lastgood import __version__
from lastgood._contents import open_contents
from lastgood._contents.reading import local_storage
from lastgood.cli._report.data import Movement, Report, Space
from lastgood.cli._report.health import health_of
from lastgood.cli._report.movement import movement_of
from lastgood.cli._report.retention import retention_of
from lastgood.cli._report.saves import saves_of
from lastgood.cli._report.space import space_of
from lastgood.cli._report.words import printable
from lastgood.errors import CheckpointNotFoundError, LastgoodError
from lastgood.manager.catalog import Catalog, read_catalog, step_name
from lastgood.manager.run_log import read_run_log


@dataclass(frozen=True)
class Wanted:
    """What the report shows of checkpoints: ``None`` stands for the newest; ``compare=False`` leaves movement out."""

    step: int | None = None
    steps_to_compare: tuple[int, int] | None = None
    compare: bool = True


def gather(root: str, wanted: Wanted) -> Report:
    """All data of the page.

    A checkpoint that somebody named has to be readable. Of the newest, which nobody named, the page says what is wrong
    and shows the rest.
    """
    storage = local_storage()
    catalog = read_catalog(storage, root)
    records = read_run_log(storage, root)
    if not catalog.entries and not records:
        where = (
            "there is no such directory" if not storage.exists(root) else "it holds no step-<number> and no run's log"
        )
        raise CheckpointNotFoundError(f"no run at {root}: {where}.", path=root)
    space, space_problem = _space(catalog, wanted)
    movement, movement_problem = _movement(catalog, wanted)
    return Report(
        lastgood=__version__,
        made_at=round(time.time(), 3),
        name=printable(os.path.basename(os.path.abspath(root)) or "/"),
        root=printable(os.path.abspath(root)),
        health=health_of(catalog),
        saves=saves_of(records),
        retention=retention_of(catalog, records),
        space=space,
        space_problem=space_problem,
        movement=movement,
        movement_problem=movement_problem,
    )


def _space(catalog: Catalog, wanted: Wanted) -> tuple[Space | None, str | None]:
    if wanted.step is not None:
        return space_of(wanted.step, open_contents(_path(catalog, wanted.step)).files), None
    if not catalog.committed:
        return None, None
    newest = catalog.committed[-1]
    try:
        return space_of(newest.step, open_contents(newest.path).files), None
    except LastgoodError as error:
        return None, printable(str(error))


def _movement(catalog: Catalog, wanted: Wanted) -> tuple[Movement | None, str | None]:
    if not wanted.compare:
        return None, "Left out, as asked."
    if wanted.steps_to_compare is not None:
        return _compared(catalog, *wanted.steps_to_compare), None
    if len(catalog.committed) < 2:
        return None, None
    before, newest = catalog.committed[-2:]
    try:
        return _compared(catalog, before.step, newest.step), None
    except LastgoodError as error:
        return None, printable(str(error))


def _compared(catalog: Catalog, step_a: int, step_b: int) -> Movement:
    path_a, path_b = _path(catalog, step_a), _path(catalog, step_b)
    from lastgood.cli._compare import compare_states

    return movement_of(step_a, step_b, compare_states(path_a, path_b))


def _path(catalog: Catalog, step: int) -> str:
    entry = catalog.entry(step)
    if entry is None:
        there = ", ".join(str(entry.step) for entry in catalog.entries[-10:]) or "none"
        path = os.path.join(catalog.root, step_name(step))
        raise CheckpointNotFoundError(
            f"no checkpoint of step {step} in {catalog.root}. The newest: {there}.", path=path
        )
    return entry.path
