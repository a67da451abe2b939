"""``lastgood report``: one page on a run that needs nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from lastgood.cli._output import Output, human_bytes
from lastgood.errors import ConfigError


def report(
    root: Annotated[Path, typer.Argument(help="The run: the directory with its step-<number> directories.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    step: Annotated[
        int | None, typer.Option(help="Show what takes the space in this step [default: the newest committed].")
    ] = None,
    compare: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="A B", help="Show what moved between these steps [default: the two newest committed]."),
    ] = None,
    no_compare: Annotated[
        bool, typer.Option("--no-compare", help="Leave that out: it imports torch and reads both checkpoints whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the page's data instead, for scripts.")] = False,
) -> None:
    """Write one self-contained HTML page on a run: its saves, retention, what takes the space, and what moved.

    The page works without a network and without lastgood. Example: lastgood report runs/gpt -o report.html
    """
    from lastgood.cli._report.gather import Wanted, gather

    if no_compare and compare is not None:
        raise ConfigError("--compare and --no-compare contradict each other: give one of the two.")
    output = Output(as_json)
    data = gather(str(root), Wanted(step=step, steps_to_compare=compare, compare=not no_compare))
    if as_json:
        output.json(data)
        return
    from lastgood._contents.reading import local_storage
    from lastgood.cli._report.page import render

    page = render(data).encode()
    local_storage().put(str(out), page)
    output.print(f"{out}: {human_bytes(len(page))}. Open it in a browser.")
