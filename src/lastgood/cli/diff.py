"""``lastgood diff``: what has changed between two checkpoints."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lastgood._memory import paused_garbage_collection
from lastgood.cli._output import AsJson, Output, printable
from lastgood.cli._target import find_checkpoint
from lastgood.errors import LastgoodError

if TYPE_CHECKING:
    from lastgood.cli._compare import Comparison

DIFFERENT, TROUBLE = 1, 2
_MOST_NAMES = 50

A = Annotated[str, typer.Argument(metavar="A", help="The earlier one: a file, a checkpoint's directory, or a run's.")]
B = Annotated[str, typer.Argument(metavar="B", help="The later one.")]


def diff(
    context: typer.Context,
    a: A,
    b: B,
    top: Annotated[int, typer.Option("--top", min=0, help="Show so many layers and tensors that moved most.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show what differs between two checkpoints, and which layers moved most.

    A tensor's change is measured by its own size: the norm of B - A divided by the norm of A. A layer is a key without
    its last part; its floating-point tensors count together. NaN in the same place is no difference. Checkpoints of
    several ranks are compared as whole states, whatever their layouts are, and values that each rank has of its own
    with those of the same rank.

    Exit status: 0 if they are equal, 1 if not, 2 if they could not be compared.

    \b
    Example:
      lastgood diff runs/gpt/step-1000 runs/gpt/step-2000 --top 20
    """
    output = Output(as_json)
    try:
        (path_a, note_a), (path_b, note_b) = find_checkpoint(a), find_checkpoint(b)
        from lastgood.cli._compare import compare_states
        from lastgood.cli._tensors import quiet_torch

        with quiet_torch(), paused_garbage_collection():
            found = compare_states(path_a, path_b)
    except (LastgoodError, OSError) as error:
        if getattr(context.find_root().obj, "debug", False):
            raise
        print("lastgood:", " ".join(printable(str(error)).splitlines()), file=sys.stderr)
        raise typer.Exit(TROUBLE) from None
    for note in (note_a, note_b):
        if note:
            output.print(f"note: {note}", style="yellow")
    _show(output, found, top)
    output.json({"equal": found.is_equal and not found.not_compared, **_fields(found)})
    if not found.is_equal:
        raise typer.Exit(DIFFERENT)
    if found.not_compared:
        raise typer.Exit(TROUBLE)


def _fields(found: "Comparison") -> dict[str, object]:
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def _show(output: Output, found: "Comparison", top: int) -> None:
    for path, names in ((found.path_a, found.only_in_a), (found.path_b, found.only_in_b)):
        _list(output, f"only in {path}:", names)
    _list(output, "of another kind, shape or dtype:", [f"{one.path}: {one.a} -> {one.b}" for one in found.changed_kind])
    _list(output, "other values:", [f"{one.path}: {one.a} -> {one.b}" for one in found.changed_values])
    _list(output, "not compared (torch's safe loader refuses them):", found.not_compared)
    moved = sorted((tensor for tensor in found.tensors if not tensor.equal), key=lambda tensor: -tensor.rms_change)
    if moved and top:
        _show_layers(output, found, top)
        output.print(f"tensors that moved most ({min(top, len(moved))} of {len(moved):,}):", style="bold")
        output.table(
            ("relative change", "largest", "largest relative", "elements changed", "tensor", "NaN in one only"),
            [
                (
                    f"{tensor.rms_change:.4g}",
                    f"{tensor.max_abs:.4g}",
                    "-" if tensor.max_rel is None else f"{tensor.max_rel:.4g}",
                    f"{tensor.changed:,}",
                    tensor.path,
                    f"{tensor.nan_in_one:,}" if tensor.nan_in_one else "",
                )
                for tensor in moved[:top]
            ],
            right=("relative change", "largest", "largest relative", "elements changed", "NaN in one only"),
        )
    output.print(_summary(found, len(moved)))


def _show_layers(output: Output, found: "Comparison", top: int) -> None:
    layers = [layer for layer in found.layers if layer.norm_change > 0]
    if not layers:
        return
    output.print(f"layers that moved most ({min(top, len(layers))} of {len(layers):,}):", style="bold")
    output.table(
        ("relative change", "norm of A", "tensors", "layer"),
        [
            (f"{layer.rms_change:.4g}", f"{layer.norm_a:.4g}", f"{layer.tensors:,}", layer.path or "(no layer)")
            for layer in layers[:top]
        ],
        right=("relative change", "norm of A", "tensors"),
    )


def _list(output: Output, title: str, lines: "tuple[str, ...] | list[str]") -> None:
    if not lines:
        return
    output.print(title, style="bold")
    for line in lines[:_MOST_NAMES]:
        output.print(f"  {line}")
    if len(lines) > _MOST_NAMES:
        output.print(f"  and {len(lines) - _MOST_NAMES:,} more (--json names all)")


def _summary(found: "Comparison", moved: int) -> str:
    same = len(found.tensors) - moved
    nan = sum(tensor.nan_in_both for tensor in found.tensors)
    nans = f"; elements that are NaN in both, and count as equal: {nan:,}" if nan else ""
    if found.is_equal and found.not_compared:
        return f"no difference found, but {len(found.not_compared)} values could not be compared{nans}"
    if found.is_equal:
        return f"equal: {same:,} tensors and {found.values_compared:,} plain values{nans}"
    return f"different: {moved:,} of {len(found.tensors):,} tensors that both have changed, {same:,} are equal{nans}"
