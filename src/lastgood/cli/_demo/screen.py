"""What a person sees while the demo runs, and at its end. Without a terminal: plain lines, no control characters."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lastgood.cli._demo.figures import Comparison, Figures, Spread
from lastgood.cli._demo.kills import Moment
from lastgood.cli._demo.protocol import Event, Resumed, StepDone
from lastgood.cli._demo.supervisor import Killed, Landed, Observer

_PLAIN_LINES_A_RUN = 5
_PATHS_SHOWN = 10
_WHERE: dict[Moment, str] = {
    "in a step": "",
    "in a save": ", in the middle of a save",
    "staged": ", in the middle of a save: staged, not yet durable",
}


@contextmanager
def progress_of(console: Console, name: str, steps: int) -> Iterator[Observer]:
    """Follow one run; the block hands the events to the function it gets."""
    if not console.is_terminal:
        yield _plain_observer(console, name, steps)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(name, total=steps, loss="starting")

        def observe(event: Event | Killed | Landed) -> None:
            match event:
                case StepDone():
                    bar.update(task, completed=event.step, loss=f"loss {event.loss:.3f}")
                case Killed():
                    bar.update(task, loss="starting again")
                case Resumed():
                    bar.update(task, completed=event.step)
            _tell_of_life_and_death(console, event)

        yield observe


def _plain_observer(console: Console, name: str, steps: int) -> Observer:
    every = max(1, steps // _PLAIN_LINES_A_RUN)

    def observe(event: Event | Killed | Landed) -> None:
        if isinstance(event, StepDone) and event.step % every == 0:
            console.print(f"{name}: step {event.step} of {steps}, loss {event.loss:.3f}", highlight=False)
        _tell_of_life_and_death(console, event)

    return observe


def _tell_of_life_and_death(console: Console, event: Event | Killed | Landed) -> None:
    if isinstance(event, Killed):
        console.print(f"  SIGKILL after step {event.last_step}{_WHERE[event.moment]}", style="red", highlight=False)
    elif isinstance(event, Landed):
        console.print(
            f"  its checkpoint process finished the save of step {event.step}", style="green", highlight=False
        )
    elif isinstance(event, Resumed):
        for reason in event.passed_over:
            console.print(f"  passed over: {reason}", style="yellow", highlight=False, markup=False)
        if event.step:
            console.print(f"  resumed at step {event.step}", style="green", highlight=False)


def figures_table(figures: Figures) -> Table:
    """The killed run in numbers."""
    table = Table(title="The killed run", show_header=False, title_justify="left", min_width=60)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("kills survived", f"{figures.kills}"),
        ("of these in the middle of a save", f"{figures.kills_in_save}"),
        ("of these between staged and durable", f"{figures.kills_after_staging}"),
        ("saves finished after the trainer's death", f"{figures.landed_after_kill}"),
        ("steps trained", f"{figures.steps}"),
        ("steps lost to kills, and done again", f"{figures.steps_repeated}"),
        ("damaged checkpoints passed over", f"{figures.passed_over}"),
        ("checkpoints written", f"{figures.checkpoints}"),
        ("size of a checkpoint", f"{figures.checkpoint_bytes / 1e6:.1f} MB"),
        ("training stood still for a save: median, longest", _spread(figures.stall)),
        ("share of the training time", f"{figures.stall_share:.2%}"),
        ("from save to staged: median, longest", _spread(figures.staging)),
        ("from save to durable: median, longest", _spread(figures.durable)),
        ("loading the last good checkpoint: median", f"{figures.load_median_seconds * 1e3:.1f} ms"),
        ("from start of process to resumed: median", f"{figures.restart_median_seconds:.1f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _spread(times: Spread) -> str:
    return f"{times.median * 1e3:.1f}, {times.longest * 1e3:.1f} ms"


def comparison_table(comparison: Comparison) -> Table:
    """The SHA-256 of both final states, part by part; their first digits."""
    table = Table(title="SHA-256 of the final state", title_justify="left", min_width=60)
    for header in ("", "never killed", "killed", ""):
        table.add_column(header)
    for part in comparison.parts:
        same = "[green]identical[/]" if part.reference == part.killed else "[red]DIFFERENT[/]"
        table.add_row(part.name, part.reference[:16], part.killed[:16], same)
    return table


def print_verdict(console: Console, comparison: Comparison) -> None:
    """The answer in words, with whole SHA-256 sums, and where the states part if they do."""
    everything = comparison.parts[-1]
    console.print(f"never killed  {everything.reference}", soft_wrap=True, highlight=False)
    console.print(f"killed        {everything.killed}", soft_wrap=True, highlight=False)
    if comparison.identical:
        console.print("Weights and optimizer state are identical, to the last bit.", style="bold green")
        return
    if comparison.different:
        console.print(f"The final states differ in {len(comparison.different)} places:", style="bold red")
        for path in comparison.different[:_PATHS_SHOWN]:
            console.print(f"  {path}", soft_wrap=True, highlight=False, markup=False)
    if not comparison.files_hold_what_was_in_memory:
        console.print("A final checkpoint does not hold what its training process had in memory.", style="bold red")
