"""``lastgood verify``: whether every byte of a checkpoint, or of all of a run's, is what was written."""

import os
from dataclasses import dataclass
from typing import Annotated

import typer

from lastgood._contents import VerifyReport, verify_checkpoint
from lastgood.cli._disk import is_one_checkpoint
from lastgood.cli._output import AsJson, Output, human_bytes
from lastgood.cli._target import Step, find_checkpoint
from lastgood.manager.catalog import Condition, is_set_aside, read_catalog
from lastgood.manager.progress import shown_progress
from lastgood.storage.local import LocalStorage


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found: ``good`` is whether nothing wrong was. ``skipped`` names what was not looked at."""

    path: str
    good: bool
    files: int
    nbytes: int
    checkpoints: list[VerifyReport]
    skipped: list[str]


def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A file, a checkpoint's directory, or a run's: all its steps.")
    ],
    everything: Annotated[bool, typer.Option("--all", help="Of a run: those set aside, too.")] = False,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte: each checksum, all that lies between the data, index against pickle, manifest against files.

    Of tensors that are spread over ranks, each file has to hold just the parts that the manifest promises, and all
    files together every tensor as a whole.

    Exit status: 0 if all is as it was written, 1 if something is damaged (file and tensor are named), 2 if there is
    nothing to check. Steps whose save never finished are passed over. Files of torch.save are checked against the
    zip's checksums; those in torch's format before 1.6 have none, and are only measured.

    \b
    Example:
      lastgood verify runs/gpt
      lastgood verify runs/gpt/step-1000 --json
    """
    output = Output(as_json)
    paths, skipped = _paths(path, step, everything=everything)
    reports = []
    for checkpoint in paths:
        with shown_progress(f"verifying {checkpoint}"):
            reports.append(verify_checkpoint(checkpoint))
        _show(output, reports[-1])
    for line in skipped:
        output.print(f"passed over: {line}", style="yellow")
    found = Verification(
        path=path,
        good=all(report.is_good for report in reports),
        files=sum(report.files for report in reports),
        nbytes=sum(report.nbytes for report in reports),
        checkpoints=reports,
        skipped=skipped,
    )
    output.json(found)
    damaged = sum(not report.is_good for report in reports)
    if len(reports) != 1:
        output.print(
            f"{len(reports) - damaged} of {len(reports)} checkpoints are whole; {human_bytes(found.nbytes)} read"
        )
    if damaged:
        raise typer.Exit(1)


def _paths(path: str, step: int | None, *, everything: bool) -> tuple[list[str], list[str]]:
    """The checkpoints to verify, and what is passed over and why."""
    storage = LocalStorage()
    if step is not None:
        return [find_checkpoint(path, step)[0]], []
    if is_one_checkpoint(storage, path):
        return [path], []
    catalog = read_catalog(storage, path)
    paths, skipped = [], []
    for entry in catalog.entries:
        if entry.condition is Condition.UNFINISHED:
            skipped.append(f"{entry.path}: {entry.problem}")
        else:
            paths.append(entry.path)
    for name in filter(is_set_aside, catalog.others):
        if everything:
            paths.append(os.path.join(path, name))
        else:
            skipped.append(f"{os.path.join(path, name)}: it was set aside as damaged (--all verifies it)")
    return (paths, skipped) if paths or skipped else ([path], [])


def _show(output: Output, report: VerifyReport) -> None:
    files = "1 file" if report.files == 1 else f"{report.files} files"
    read = f"{files}, {human_bytes(report.nbytes)}"
    if report.is_good:
        output.print(f"good: {report.path} ({read})", style="green")
    else:
        output.print(f"DAMAGED: {report.path} ({read})", style="bold red")
    for problem in report.problems:
        message = problem.message
        output.print(f"  {message if problem.file in message else f'{problem.file}: {message}'}")
    for note in report.notes:
        output.print(f"  note: {note}", style="yellow")
    if not report.is_good:
        output.print("  Nothing damaged should be used: load an earlier checkpoint, or another copy of this one.")
