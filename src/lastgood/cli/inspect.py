"""``lastgood inspect``: what is in a checkpoint, key by key, without loading it."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from lastgood._contents import Contents, FileContents, open_contents
from lastgood._contents.joint import is_joint, own_paths
from lastgood._contents.shown import box_text, shape_text
from lastgood._memory import paused_garbage_collection
from lastgood.cli._output import AsJson, Output, human_age, human_bytes, human_moment
from lastgood.cli._stats import Stats, stats_of
from lastgood.cli._target import CheckpointPath, Step, find_checkpoint
from lastgood.cli._tree import Group, Row, cut, ranks_text, rows_of
from lastgood.cli._tree import as_json as row_as_json
from lastgood.format.nodes import OpaqueNode, ShardedNode, TensorNode, parts_of, sharded_nodes
from lastgood.format.spec import DTYPES, UNTYPED

_COLUMNS = ("key", "kind", "shape", "size", "ranks", "value", "min", "max", "mean", "std", "NaN", "Inf")
_RIGHT = ("size", "min", "max", "mean", "std", "NaN", "Inf")


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks. What several keys share is counted once; ``nbytes`` is that of the tensors' storages.

    A tensor that is spread over ranks counts as one: ``sharded`` of them are, which take ``sharded_nbytes`` together.
    Of a single file, the parts that are in it count for all but these two.
    """

    tensors: int
    sharded: int
    sharded_nbytes: int
    elements: int
    nbytes: int
    nbytes_by_dtype: dict[str, int]
    file_nbytes: int


def inspect(
    path: CheckpointPath,
    step: Step = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Show keys of so many parts, and sums of those below.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every key, however many there are.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the tensors: min, max, mean, std, NaN and Inf of each. Needs torch.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a checkpoint: keys, shapes, dtypes, sizes, plain values, and totals.

    Reads no tensor data, except with --stats. Works on files of torch.save, too, and runs nothing of them. The keys
    are those that 'lastgood cat' takes. Where there are very many, groups of them are shown as one line. A tensor that
    is spread over ranks has one line, with its global shape; of a single rank's file, its parts are shown, too.

    \b
    Example:
      lastgood inspect runs/gpt
      lastgood inspect runs/gpt --step 1000 --depth 2
      lastgood inspect model.pt --all --stats
    """
    output = Output(as_json)
    found, note = find_checkpoint(path, step)
    with paused_garbage_collection():
        contents = open_contents(found)
        own = own_paths(contents.files, contents.manifest) if contents.manifest is not None else ()
        rows = rows_of(contents.files, by_rank=stats, own=own)
    shown = list(rows) if as_json else cut(rows, depth, everything=everything)
    measured = _measure(contents, [row for row in shown if isinstance(row, Row)]) if stats else {}
    if as_json:
        output.json(_document(contents, rows, measured))
        return
    for line in (note, *contents.notes):
        if line:
            output.print(f"note: {line}", style="yellow")
    for file in contents.files:
        output.print(_describe(file))
    several = len(contents.files) > 1
    output.table(_COLUMNS, [_cells(item, measured, several=several) for item in shown], right=_RIGHT)
    hidden = sum(item.rows for item in shown if isinstance(item, Group))
    if hidden:
        output.print(f"{hidden:,} keys are hidden in the lines that end in *: --depth N shows more, --all everything")
    for line in _totals_text(totals(contents.files, rows)):
        output.print(line)
    if own:
        output.print(_own_text(rows))


def totals(files: Sequence[FileContents], rows: Sequence[Row]) -> Totals:
    """What the tensors of all files come to; ``rows`` are those of these files."""
    count = sharded = sharded_nbytes = elements = 0
    dtypes: dict[tuple[int, int], str] = {}
    for row in rows:
        if isinstance(row.node, ShardedNode):
            if row.shares_with is None:
                count += 1
                sharded += 1
                sharded_nbytes += row.nbytes
                elements += row.times * math.prod(row.node.shape)
        elif isinstance(row.node, TensorNode) and row.same_as is None:
            count += len(row.ranks) if row.box is None else 0
            elements += len(row.ranks) * math.prod(row.node.shape)
            for rank in row.ranks:
                dtypes.setdefault((rank, row.node.storage), row.node.dtype)
    by_dtype: Counter[str] = Counter()
    for file in files:
        for number, entry in enumerate(file.storages):
            dtype = entry.dtype if entry.dtype != UNTYPED else dtypes.get((file.rank, number), "other")
            by_dtype[dtype] += entry.nbytes
    file_nbytes = sum(file.nbytes for file in files)
    return Totals(count, sharded, sharded_nbytes, elements, by_dtype.total(), dict(by_dtype.most_common()), file_nbytes)


@dataclass(frozen=True)
class Held:
    """What one file holds of tensors that are spread over ranks; a part that several keys share is counted once."""

    tensors: int = 0
    parts: int = 0
    nbytes: int = 0


def held_in(file: FileContents) -> Held:
    """What one file holds of tensors that are spread over ranks."""
    if not file.meshes:
        return Held()
    spread = [node for _, node in sharded_nodes(file.root)]
    parts = {(part.storage, part.offset, part.shape): part for node in spread for _, part in parts_of(node)}
    nbytes = sum(math.prod(part.shape) * DTYPES[part.dtype].itemsize for part in parts.values())
    return Held(len(spread), len(parts), nbytes)


def _measure(contents: Contents, rows: Sequence[Row]) -> dict[int, Stats]:
    """The statistics of the rows that are tensors, by the rows' ids; each row is of one rank, or of a spread tensor."""
    from lastgood.cli._tensors import TensorSource, quiet_torch
    from lastgood.cli._whole import WholeSource

    found: dict[int, Stats] = {}
    spread = [row for row in rows if row.mesh is not None]
    if spread and is_joint(contents):
        with quiet_torch(), paused_garbage_collection(), WholeSource(contents.path) as source:
            whole = source.spread_under([row.path for row in spread])
            found |= zip(map(id, spread), stats_of(source, whole), strict=True)
    for file in contents.files:
        wanted = [row for row in rows if row.ranks == [file.rank] and isinstance(row.node, TensorNode)]
        nodes = [row.node for row in wanted if isinstance(row.node, TensorNode)]
        if nodes:
            with quiet_torch(), paused_garbage_collection(), TensorSource(file.path) as source:
                found |= zip(map(id, wanted), stats_of(source, nodes), strict=True)
    return found


def _document(contents: Contents, rows: Sequence[Row], measured: dict[int, Stats]) -> dict[str, object]:
    entries = []
    for row in rows:
        entry = row_as_json(row)
        if id(row) in measured:
            entry["stats"] = measured[id(row)]
        entries.append(entry)
    about = ("path", "kind", "nbytes", "rank", "world_size", "step", "saved_at", "metrics", "save_id", "byteorder")
    return {
        "path": contents.path,
        "notes": contents.notes,
        "committed_together": contents.manifest is not None,
        "files": [
            {name: getattr(file, name) for name in about} | {"sharded": asdict(held_in(file))}
            for file in contents.files
        ],
        "totals": asdict(totals(contents.files, rows)),
        "keys": entries,
    }


def _describe(file: FileContents) -> str:
    kinds = {
        "lastgood": "a checkpoint of lastgood's",
        "torch zip": "a file of torch.save's",
        "torch legacy": "a file in torch's format before 1.6, without checksums",
    }
    facts = [kinds[file.kind], human_bytes(file.nbytes)]
    if file.world_size > 1:
        facts.append(f"rank {file.rank} of {file.world_size}")
    held = held_in(file)
    if held.tensors:
        facts.append(f"{held.parts:,} parts of {held.tensors:,} spread tensors ({human_bytes(held.nbytes)})")
    if file.step is not None:
        facts.append(f"step {file.step}")
    if file.saved_at is not None:
        facts.append(f"saved {human_moment(file.saved_at)} ({human_age(file.saved_at, time.time())})")
    for name, value in (file.metrics or {}).items():
        facts.append(f"{name} {'?' if value is None else format(value, '.6g')}")
    return f"{file.path}: {', '.join(facts)}"


def _cells(item: Row | Group, measured: dict[int, Stats], *, several: bool) -> list[str]:
    if isinstance(item, Group):
        what = "1 tensor" if item.tensors == 1 else f"{item.tensors:,} tensors"
        return [f"{item.path}*", what, "", human_bytes(item.nbytes), *[""] * 8]
    is_tensor = item.shape is not None
    kind, shape = (item.dtype or "", shape_text(item.shape)) if item.shape is not None else (item.kind, "")
    size = human_bytes(item.nbytes) if is_tensor else ""
    ranks = ranks_text(item.ranks) if several else ""
    stats = _stats_cells(measured.get(id(item)))
    return [item.path or "(the whole value)", kind, shape, size, ranks, _value_text(item), *stats]


def _value_text(row: Row) -> str:
    if row.same_as is not None:
        return f"the same object as {row.same_as}"
    if isinstance(row.node, TensorNode | ShardedNode):
        words = ["parameter"] if "p" in row.node.flags else ["requires grad"] if "g" in row.node.flags else []
        words += [row.shown] if row.shown else []
        if row.box is not None:
            words.append(f"the part {box_text(row.box)}")
        if row.shares_with is not None:
            words.append(f"shares memory with {row.shares_with}")
    else:
        words = [row.shown.removeprefix(f"{row.kind} ")]
    if row.differs:
        words.append("may differ between ranks" if isinstance(row.node, OpaqueNode) else "differs between ranks")
    return ", ".join(words)


def _own_text(rows: Sequence[Row]) -> str:
    count = len({row.path for row in rows if row.differs})
    what = "1 value is" if count == 1 else f"{count:,} values are"
    return f"{what} not the same on all ranks: another number of ranks, and 'lastgood export', need a rule for them"


def _stats_cells(stats: Stats | None) -> list[str]:
    if stats is None:
        return [""] * 6
    numbers = (stats.min, stats.max, stats.mean, stats.std)
    return ["-" if number is None else f"{number:.4g}" for number in numbers] + [str(stats.nan), str(stats.inf)]


def _totals_text(sums: Totals) -> list[str]:
    tensors = "1 tensor" if sums.tensors == 1 else f"{sums.tensors:,} tensors"
    if sums.sharded:
        tensors += f" ({sums.sharded:,} of them spread over ranks, {human_bytes(sums.sharded_nbytes)} in all)"
    lines = [
        f"{tensors}, {sums.elements:,} elements, {human_bytes(sums.nbytes)} of data "
        f"in {human_bytes(sums.file_nbytes)} of files"
    ]
    if len(sums.nbytes_by_dtype) > 1:
        parts = [f"{dtype} {human_bytes(nbytes)}" for dtype, nbytes in sums.nbytes_by_dtype.items()]
        lines.append("by dtype: " + ", ".join(parts))
    return lines
