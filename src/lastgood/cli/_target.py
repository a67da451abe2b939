"""Which checkpoint a verb is asked about: a file, a checkpoint's directory, or a step of a run."""

import os
from typing import Annotated, TypeAlias

import typer

from lastgood.cli._disk import is_one_checkpoint
from lastgood.errors import CheckpointNotFoundError
from lastgood.manager.catalog import read_entry, step_name, step_of
from lastgood.storage.local import LocalStorage

CheckpointPath: TypeAlias = Annotated[
    str, typer.Argument(metavar="PATH", help="A file, a checkpoint's directory, or a run's: its newest step is taken.")
]
Step: TypeAlias = Annotated[int | None, typer.Option("--step", help="Of a run: this step, instead of the newest.")]


def find_checkpoint(path: str, step: int | None = None) -> tuple[str, str | None]:
    """The path of the checkpoint that is meant, and what to tell about how it was found.

    Of a run it is the one of ``step``, or the newest that is committed. What is neither a run's directory nor there
    comes back as it is: whoever opens it says so.
    """
    storage = LocalStorage()
    if step is not None:
        chosen = os.path.join(path, step_name(step))
        if not storage.exists(chosen):
            there = ", ".join(map(str, steps_under(path)[-10:])) or "no step at all"
            raise CheckpointNotFoundError(f"{path} has no step {step}; it has {there}.", path=path)
        return chosen, None
    if is_one_checkpoint(storage, path):
        return path, None
    steps = steps_under(path)
    for number in reversed(steps):
        entry = read_entry(storage, path, number)
        if entry.is_committed:
            return entry.path, f"{path} is a run: this is step {number}, its newest committed checkpoint"
    if steps:
        raise CheckpointNotFoundError(
            f"none of the {len(steps)} steps under {path} is committed; 'lastgood doctor {path}' explains. --step N "
            "takes one all the same.",
            path=path,
        )
    return path, None


def steps_under(root: str) -> list[int]:
    """The steps that have a directory under ``root``, in rising order."""
    names = LocalStorage().list(root)
    return sorted(step for name in names if (step := step_of(name)) is not None)
