"""``lastgood demo``: a training that is killed again and again, and loses nothing."""

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    steps: Annotated[int, typer.Option(min=2, help="How many steps to train.")] = 200,
    kills: Annotated[int, typer.Option(min=0, help="How often to kill the training; most often during a save.")] = 5,
    out: Annotated[Path, typer.Option(help="Directory for checkpoints, log and picture.")] = Path("lastgood-demo"),
    seed: Annotated[
        int | None, typer.Option(help="Draw weights and kills from this seed [default: a random one].")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoints in the directory.")] = False,
) -> None:
    """Train a small GPT, kill it with SIGKILL at random moments, resume, and compare with a run never killed.

    It saves in the background. What is staged when it is killed is still written, by its checkpoint process.

    Takes about two minutes on two cores. Exits with status 1 if the two runs differ in a single bit.
    """
    from lastgood.cli._demo.show import show

    seed = secrets.randbelow(1_000_000) if seed is None else seed
    if not show(out, steps=steps, kills=kills, seed=seed, keep=keep, console=Console()):
        raise typer.Exit(1)
