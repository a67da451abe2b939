"""The ``lastgood`` command: one file for each verb.

Nothing here imports torch before a verb needs it: ``lastgood --help`` answers at once.
"""

import atexit
import dataclasses
import gc
import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from lastgood import __version__
from lastgood._memory import paused_garbage_collection
from lastgood.cli import cat, demo, diff, doctor, export, inspect, ls, prune, report, verify
from lastgood.cli._output import printable
from lastgood.errors import CheckpointNotFoundError, ConfigError, LastgoodError

FAILED, WRONG_CALL, INTERRUPTED = 1, 2, 130
"""The statuses that the command ends with when something is in the way; 0 is for all is well."""

app = typer.Typer(
    name="lastgood",
    help="Checkpoints of PyTorch trainings that are there, whole and verified, whatever died.",
    epilog="'lastgood VERB --help' tells more of each. Verbs that answer questions take --json. Exit status: 0 all is "
    "well, 1 something was found or failed, 2 the command was called wrongly or there is nothing at that path.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("ls", short_help="List the checkpoints of a run.")(ls.ls)
app.command("inspect", short_help="Show what is in a checkpoint.")(inspect.inspect)
app.command("verify", short_help="Check every byte of a checkpoint, or of a run.")(verify.verify)
app.command("diff", short_help="Show what differs between two checkpoints.")(diff.diff)
app.command("cat", short_help="Print or save one value of a checkpoint.")(cat.cat)
app.command("export", short_help="Make one plain file of a checkpoint, for torch.load.")(export.export)
app.command("prune", short_help="Remove the checkpoints that no rule keeps.")(prune.prune)
app.command("doctor", short_help="Explain what is wrong in a run's directory.")(doctor.doctor)
app.command("report", short_help="Write a page on a run: saves, space, changes.")(report.report)
app.command("demo", short_help="Kill a training again and again; lose nothing.")(demo.demo)


@dataclasses.dataclass
class _Settings:
    debug: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lastgood {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LASTGOOD_DEBUG", help="Show where in the code an error comes from.")
    ] = False,
) -> None:
    """Options that come before any verb."""
    context.ensure_object(_Settings).debug = debug
    if context.invoked_subcommand != "demo":  # which goes on for minutes; the others make very many objects, once
        context.with_resource(paused_garbage_collection())


def main() -> NoReturn:
    """The entry point of the command. What goes wrong is said in one line, without a traceback unless asked for."""
    settings = _Settings()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    atexit.register(gc.freeze)  # all memory goes at the end: very many objects need not be looked through first
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="lastgood", obj=settings, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        status = FAILED
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        if settings.debug:
            raise
        status = _complain(error)
    if status == INTERRUPTED:
        print("lastgood: interrupted", file=sys.stderr)
    _flush_or_discard()
    sys.exit(status if isinstance(status, int) else 0)


def _complain(error: Exception) -> int:
    """Say in one line what went wrong; returns the status to end with."""
    if isinstance(error, LastgoodError):
        text, status = str(error), WRONG_CALL if isinstance(error, ConfigError | CheckpointNotFoundError) else FAILED
    elif isinstance(error, OSError) and error.strerror:
        text, status = f"{error.filename}: {error.strerror}" if error.filename else error.strerror, FAILED
    elif hasattr(error, "format_message"):  # how typer says that the command was called wrongly
        hint = getattr(getattr(error, "ctx", None), "command_path", "lastgood")
        text = f"{error.format_message().rstrip('.')}. See '{hint} --help'."
        status = getattr(error, "exit_code", WRONG_CALL)
    else:
        text, status = f"a defect in lastgood: {error!r}. 'lastgood --debug ...' shows where; please report it.", FAILED
    print("lastgood:", " ".join(printable(text).splitlines()), file=sys.stderr)
    return int(status)


def _flush_or_discard() -> None:
    """Leave nothing that the interpreter would try, and complain, to write at its end: ``head`` may have gone."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
