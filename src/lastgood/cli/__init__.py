"""The ``lastgood`` command: one file for each verb.

Nothing here imports torch before a verb needs it: ``lastgood --help`` answers at once.
"""

import sys
from typing import Annotated

import typer

from lastgood import __version__
from lastgood.cli import demo
from lastgood.errors import LastgoodError

app = typer.Typer(
    name="lastgood",
    help="Checkpoints of PyTorch trainings that are there, whole and verified, whatever died.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lastgood {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options that come before any verb."""


def main() -> None:
    """The entry point of the command. An error that lastgood raised on purpose is shown without a traceback."""
    try:
        app()
    except LastgoodError as error:
        print(f"lastgood: {error}", file=sys.stderr)
        sys.exit(1)
