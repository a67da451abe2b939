"""``lastgood doctor``: what is not as it should be in a run's directory, and what to do about it."""

import msgspec
import typer

from lastgood.cli._disk import Root, is_one_checkpoint, require_directory
from lastgood.cli._doctor.facts import look
from lastgood.cli._doctor.findings import Finding, diagnose
from lastgood.cli._output import AsJson, Output
from lastgood.errors import ConfigError
from lastgood.storage.local import LocalStorage


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What ``doctor`` has to say. ``latest`` is the newest committed step."""

    path: str
    latest: int | None
    needs_action: bool
    findings: list[Finding]


def doctor(root: Root, as_json: AsJson = False) -> None:
    """Explain what is not as it should be, what that means, what is safe, and what to do.

    It looks at unfinished, damaged, foreign and unreadable checkpoints, at those set aside, at what killed writers
    left, at failures in the run's log, at clocks and at the space that is left. It reads what commits and describes a
    checkpoint, not the tensors: 'lastgood verify' does that. It changes nothing. Exit status: 0 if there is nothing to
    do, 1 otherwise.

    \b
    Example:
      lastgood doctor runs/gpt
      lastgood doctor runs/gpt --json | jq -r '.findings[].command'
    """
    storage = LocalStorage()
    require_directory(root)
    if is_one_checkpoint(storage, root):
        raise ConfigError(f"{root} is a single checkpoint: 'lastgood verify {root}' looks at all of it.", path=root)
    facts = look(storage, root)
    findings = diagnose(facts)
    committed = facts.catalog.committed
    diagnosis = Diagnosis(
        path=root,
        latest=committed[-1].step if committed else None,
        needs_action=any(finding.needs_action for finding in findings),
        findings=findings,
    )
    output = Output(as_json)
    output.json(diagnosis)
    _show(output, diagnosis, len(committed))
    if diagnosis.needs_action:
        raise typer.Exit(1)


def _show(output: Output, diagnosis: Diagnosis, committed: int) -> None:
    for finding in diagnosis.findings:
        output.print(f"{finding.kind}: {finding.path}", style="bold red" if finding.needs_action else "bold")
        for text in (finding.what, finding.means, f"Safe: {finding.safe}", f"To do: {finding.do}"):
            output.print(f"  {text}")
        if finding.command is not None:
            output.print(f"    {finding.command}")
        output.print()
    count = f"{committed} committed checkpoint{'' if committed == 1 else 's'}"
    newest = "" if diagnosis.latest is None else f", the newest of step {diagnosis.latest}"
    to_do = sum(finding.needs_action for finding in diagnosis.findings)
    output.print(f"{count}{newest}. " + (f"{to_do} to look at." if to_do else "Nothing to do."))
