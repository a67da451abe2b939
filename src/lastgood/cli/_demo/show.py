"""The demo from start to end: the run that is never killed, the killed run, and what they have in common."""

from pathlib import Path

import msgspec
from rich.console import Console

from lastgood.cli._demo.comparison import compare
from lastgood.cli._demo.figures import figures_of
from lastgood.cli._demo.kills import plan_kills
from lastgood.cli._demo.picture import draw
from lastgood.cli._demo.protocol import Settings
from lastgood.cli._demo.screen import comparison_table, figures_table, print_verdict, progress_of
from lastgood.cli._demo.supervisor import run_to_the_end
from lastgood.cli._demo.workspace import Workspace

_SAVES_A_RUN = 20


def show(out: Path, *, steps: int, kills: int, seed: int, keep: bool, console: Console) -> bool:
    """Whether the killed run ended bit for bit where the other did. Leaves the picture in ``out``."""
    workspace = Workspace(out)
    plan = plan_kills(kills, steps=steps, seed=seed)
    killed = Settings(
        checkpoints=str(workspace.checkpoints),
        steps=steps,
        save_every=max(2, steps // _SAVES_A_RUN),
        seed=seed,
    )
    # The reference saves its final state alone: so it also shows that saving does not disturb the training.
    reference = msgspec.structs.replace(killed, checkpoints=str(workspace.reference), save_every=steps)
    console.print(f"A small GPT learns the source of Python's standard library (seed {seed}).", soft_wrap=True)

    with progress_of(console, "never killed", steps) as observe:
        reference_lives = run_to_the_end(reference, [], workspace.log, observe)
    with progress_of(console, "killed", steps) as observe:
        killed_lives = run_to_the_end(killed, plan, workspace.log, observe)

    final = f"step-{steps}"
    comparison = compare(
        reference=(workspace.reference / final, reference_lives), killed=(workspace.checkpoints / final, killed_lives)
    )
    figures = figures_of(killed_lives)
    console.print(figures_table(figures))
    console.print(comparison_table(comparison))
    print_verdict(console, comparison)

    outcome = "the same bits" if comparison.identical else "DIFFERENT bits"
    title = f"{figures.kills} kills, {figures.kills_in_save} in the middle of a save: {outcome} at the end"
    workspace.picture.write_text(draw(reference_lives, killed_lives, title=title), encoding="utf-8")
    console.print(f"Picture: {workspace.picture}", soft_wrap=True, highlight=False)
    if keep or not comparison.identical:
        console.print(f"Checkpoints: {workspace.checkpoints}", soft_wrap=True, highlight=False)
    else:
        workspace.remove_checkpoints()
    return comparison.identical
