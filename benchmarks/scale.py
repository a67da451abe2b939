"""Saving and loading plans, and the commit, for more ranks than any machine here has: mostly a simulation.

``python benchmarks/scale.py`` prints tables; docs/scale.md says what they mean. Nothing is asserted about them.
"""

import argparse
import functools
import gc
import json
import math
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import scale_states as states
from scale_store import VOTES_AT_ONCE, Round, measure_commit

from lastgood.format import sharding
from lastgood.format.manifest import decode_manifest, encode_manifest
from lastgood.format.mesh import Mesh, check_mesh

RANKS = (8, 128, 2048, 16384)
TENSORS = (1_000, 10_000, 100_000)
CLIENTS = (16, 64, 256)
PARTS = ("save", "commit", "load", "store")

MESSAGES_OF_RANK = 11
MESSAGES_OF_RANK_0 = 17
"""Beside those that fetch the votes."""

MOST_PIECES = 2**18
"""Of a plan that is worked out; larger ones are only calculated from these."""


@dataclass
class Line:
    """A figure for each number of ranks; ``None`` where it was not measured."""

    name: str
    figures: list[float | None]


@dataclass
class Table:
    """Figures of one kind."""

    key: str
    title: str
    unit: str
    columns: Sequence[int]
    lines: list[Line] = field(default_factory=list)
    heading: str = "ranks"


@dataclass
class Aim:
    """What was to be reached, and what was."""

    what: str
    limit: float
    found: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.found <= self.limit


def main() -> None:
    options = _options()
    ranks = RANKS[:2] if options.quick else RANKS
    tensors = TENSORS[:1] if options.quick else TENSORS
    clients = CLIENTS[:1] if options.quick else CLIENTS
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    wanted = [options.only] if options.only else PARTS
    tables: list[Table] = []
    for table in _tables(wanted, ranks, tensors):
        print(_text_of(table), flush=True)
        tables.append(table)
    rounds, aims = [], []
    if "store" in wanted:
        rounds = [_commit_round(number) for number in clients]
        print(_text_of_store(rounds, ranks[-1]), flush=True)
    if wanted == PARTS:
        aims = _aims(tables, ranks, quick=options.quick)
        print(_text_of_aims(aims), flush=True)
    if options.json:
        document = {"machine": machine, "tables": [asdict(table) for table in tables]}
        document |= {"store": [asdict(each) for each in rounds], "aims": [asdict(aim) for aim in aims]}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Simulate plans and commits of many ranks.")
    parser.add_argument("--quick", action="store_true", help="small sizes only: seconds instead of minutes")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all, and nothing about the aims")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file too")
    return parser.parse_args()


# Measuring


def _seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """Processor time of the fastest of some rounds, each with nothing remembered; fewer rounds of what takes long."""
    found: list[float] = []
    for _ in range(rounds):
        _forget()
        gc.collect()
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
        if sum(found) > 1:
            break
    return min(found)


def _peak_bytes(work: Callable[[], Any]) -> int:
    """How much Python allocates at most beyond what is there before."""
    _forget()
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _forget() -> None:
    for cached in vars(sharding).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def growth(columns: Sequence[float], figures: Sequence[float | None]) -> float | None:
    """The exponent with which figures grow: the slope of their logarithms; 0 if they do not depend on the columns."""
    points = [(math.log(x), math.log(y)) for x, y in zip(columns, figures, strict=True) if y]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


# The tables


def _tables(wanted: Sequence[str], ranks: Sequence[int], tensors: Sequence[int]) -> Iterator[Table]:
    if "save" in wanted:
        yield _mesh_table(ranks)
        yield from _save_tables(ranks, tensors)
    if "commit" in wanted:
        yield from _commit_tables(ranks, tensors)
    if "load" in wanted:
        yield from _load_tables(ranks, tensors)


def _mesh_table(ranks: Sequence[int]) -> Table:
    table = Table("mesh", "Making a mesh, once for all tensors on it", "ms", ranks)

    def made(count: int) -> Mesh:
        mesh = states.FSDP_TP.mesh(count)
        check_mesh(mesh)
        return mesh

    table.lines.append(Line("FSDP x TP", [1e3 * _seconds(lambda count=count: made(count)) for count in ranks]))
    return table


def _save_tables(ranks: Sequence[int], tensors: Sequence[int]) -> Iterator[Table]:
    times = Table("save plan", "One rank plans what it writes", "ms", ranks)
    memory = Table("save plan memory", "One rank's plan of what it writes: memory at most", "MB", ranks)
    for kind in states.KINDS:
        for number in tensors:
            names = states.tensor_names(number)
            line, peak = (Line(f"{kind.name}, {number:,} tensors", []) for _ in range(2))
            for count in ranks:
                mesh = kind.mesh(count)
                check_mesh(mesh)
                sizes = states.shapes(number, count if kind is not states.HSDP else states.SHARDS_OF_HSDP)
                arguments = (kind, mesh, names, sizes, count // 3)
                line.figures.append(1e3 * _seconds(lambda plan=arguments: states.plan_save(*plan)))
                if number < 100_000:
                    peak.figures.append(1e-6 * _peak_bytes(lambda plan=arguments: states.plan_save(*plan)))
            times.lines.append(line)
            if peak.figures:
                memory.lines.append(peak)
    yield times
    yield memory


def _commit_tables(ranks: Sequence[int], tensors: Sequence[int]) -> Iterator[Table]:
    vote = Table("vote", "One rank's vote", "bytes", ranks)
    layout_table = Table(
        "layouts", "The table that all ranks share, in each rank's hands and once in the store", "kB", ranks
    )
    ballot = Table("ballot", "One rank makes its vote and that table", "ms", ranks)
    tally = Table("tally", "Rank 0 counts all votes and encodes the manifest", "ms", ranks)
    memory = Table("tally memory", "Rank 0's count: memory at most, the votes themselves included", "MB", ranks)
    manifest = Table("manifest", "The manifest", "kB", ranks)
    for number in tensors:
        lines = {
            each.key: Line(f"{number:,} tensors", []) for each in (vote, layout_table, ballot, tally, memory, manifest)
        }
        unlike = Line(f"{number:,} tensors, a value unlike on each rank", [])
        for count in ranks:
            first = _first_ballot(states.FSDP_TP, number, count)
            lines["vote"].figures.append(len(first.ballot.vote))
            lines["layouts"].figures.append(sum(map(len, first.ballot.tables.values())) / 1e3)
            lines["ballot"].figures.append(1e3 * first.seconds)
            for each_differs, line in ((False, lines["tally"]), (True, unlike)):
                votes = states.votes_of_all(first.ballot, count, each_differs=each_differs)
                counted = lambda votes=votes, first=first: encode_manifest(states.count(votes, first.ballot))  # noqa: E731
                line.figures.append(1e3 * _seconds(counted))
            lines["manifest"].figures.append(len(counted()) / 1e3)
            lines["tally memory"].figures.append(1e-6 * (_peak_bytes(counted) + sum(map(len, votes))))
        for each in (vote, layout_table, ballot, tally, memory, manifest):
            each.lines.append(lines[each.key])
        tally.lines.append(unlike)
    yield from (vote, layout_table, ballot, tally, memory, manifest, _message_table(ranks))


@dataclass
class _FirstBallot:
    ballot: states.Ballot
    seconds: float


@functools.cache
def _first_ballot(kind: states.Parallelism, number: int, count: int) -> _FirstBallot:
    mesh = kind.mesh(count)
    rank = count // 3
    plan = states.plan_save(kind, mesh, states.tensor_names(number), states.shapes(number, count), rank)
    index = states.index_of(plan, mesh, rank, count)
    return _FirstBallot(states.ballot(index), _seconds(lambda: states.ballot(index)))


def _message_table(ranks: Sequence[int]) -> Table:
    table = Table("messages", "Messages to the store in one commit, calculated (tests count them for real)", "", ranks)
    of_first = [_messages_of_rank_0(count) for count in ranks]
    table.lines.append(Line("each rank but 0", [float(MESSAGES_OF_RANK) for _ in ranks]))
    table.lines.append(Line("rank 0", [float(each) for each in of_first]))
    together = [MESSAGES_OF_RANK * (n - 1) + each for n, each in zip(ranks, of_first, strict=True)]
    table.lines.append(Line("all together", [float(each) for each in together]))
    return table


def _messages_of_rank_0(ranks: int) -> int:
    return MESSAGES_OF_RANK_0 + math.ceil(ranks / VOTES_AT_ONCE)


def _load_tables(ranks: Sequence[int], tensors: Sequence[int]) -> Iterator[Table]:
    decode = Table("decode", "Decoding and checking the manifest", "ms", ranks)
    plan = Table("load plan", "One rank plans what it reads, the manifest decoded", "ms", ranks)
    piece = Table("load piece", "The same for each piece that is read", "us", ranks)
    files = Table("load files", "Files that this rank opens", "files", ranks)
    for number in tensors:
        decoding = Line(f"{number:,} tensors", [])
        lines = {name: (Line(name, []), Line(name, []), Line(name, [])) for name in _load_names(number)}
        for count in ranks:
            first = _first_ballot(states.FSDP_TP, number, count).ballot
            data = encode_manifest(states.count(states.votes_of_all(first, count, each_differs=False), first))
            decoding.figures.append(1e3 * _seconds(lambda data=data: decode_manifest(data)))
            manifest = decode_manifest(data)
            for name, readers in zip(lines, (count // 2, count * 2, 1), strict=True):
                figures = _load_figures(manifest, readers, number * max(1, count // readers))
                for line, figure in zip(lines[name], figures, strict=True):
                    line.figures.append(figure)
        decode.lines.append(decoding)
        for all_of in lines.values():
            for table, line in zip((plan, piece, files), all_of, strict=True):
                table.lines.append(line)
    yield from (decode, plan, piece, files)


def _load_names(number: int) -> list[str]:
    return [f"{number:,} tensors, {what}" for what in ("half as many ranks", "twice as many", "one process")]


def _load_figures(manifest: Any, readers: int, pieces: int) -> tuple[float | None, float | None, float | None]:
    if pieces > MOST_PIECES:
        return None, None, float(manifest.world_size)
    mesh = states.FSDP_TP.mesh(readers)
    rank = readers // 3
    plans: list[tuple[int, set[int]]] = []
    seconds = _seconds(lambda: plans.append(states.plan_load(manifest, states.FSDP_TP, mesh, rank)))
    found, opened = plans[-1]
    return 1e3 * seconds, 1e6 * seconds / max(1, found), float(len(opened))


# The store


def _commit_round(clients: int) -> Round:
    first = _first_ballot(states.FSDP_TP, 1_000, clients).ballot
    votes = states.votes_of_all(first, clients, each_differs=True)
    (table,) = first.tables.values()
    # What else the machine does can only make one slower.
    return min(
        (measure_commit(clients, votes, table) for _ in range(3)), key=lambda each: each.vote_secs + each.commit_secs
    )


# Aims


def _aims(tables: Sequence[Table], ranks: Sequence[int], *, quick: bool) -> list[Aim]:
    by_key = {table.key: table for table in tables}
    slopes = [growth(ranks, line.figures) or 0.0 for line in by_key["save plan"].lines]
    largest = max(figure for line in by_key["tally"].lines for figure in line.figures if figure)
    aims = [
        Aim("Planning a save on one rank: growth with the number of ranks, at most", 0.1, max(slopes), ""),
        Aim(f"Counting {ranks[-1]:,} votes, at most", 5.0, largest / 1e3, "s"),
    ]
    wanted = [("512 ranks", 512), ("2,048 ranks", 2048), ("one process", 1)]
    for name, readers in wanted[:2] if quick else wanted:
        seconds = _thousand_shards(readers)
        aims.append(
            Aim(f"1,024 tensors in 1,024 shards each, wanted on {name}: planning on one, at most", 1.0, seconds, "s")
        )
    return aims


def _thousand_shards(readers: int) -> float:
    first = _first_ballot(states.FSDP, 1024, 1024).ballot
    data = encode_manifest(states.count(states.votes_of_all(first, 1024, each_differs=False), first))
    mesh = states.FSDP.mesh(readers)
    return _seconds(lambda: states.plan_load(decode_manifest(data), states.FSDP, mesh, readers // 3), rounds=1)


# Text


def _text_of(table: Table) -> str:
    width = max(len(line.name) for line in table.lines)
    unit = f" [{table.unit}]" if table.unit else ""
    heads = "".join(f"{column:>10,}" for column in table.columns)
    rows = [f"\n{table.title}{unit}", f"  {table.heading:<{width}}{heads}{'growth':>10}"]
    for line in table.lines:
        cells = "".join(f"{'-' if figure is None else _number(figure):>10}" for figure in line.figures)
        slope = growth(table.columns, line.figures)
        rows.append(f"  {line.name:<{width}}{cells}{'-' if slope is None else f'n^{slope + 0.0:.2f}':>10}")
    return "\n".join(rows)


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _text_of_store(rounds: Sequence[Round], most_ranks: int) -> str:
    rows = ["\nA store on loopback, for real: one connection a rank, each a thread of one process"]
    rate = 1.0
    for each in rounds:
        total = each.messages_of_rank * (each.ranks - 1) + each.messages_of_rank_0
        rate = total / (each.vote_secs + each.commit_secs)
        rows += (
            f"  {each.ranks:>5} ranks: votes {each.vote_secs * 1e3:.0f} ms, commit {each.commit_secs * 1e3:.0f} ms; "
            f"{each.vote_secs / each.ranks * 1e6:.0f} us a vote of {each.vote_bytes} bytes; {rate:,.0f} messages/s",
            f"        messages: {each.messages_of_rank} of a rank at most, {each.messages_of_rank_0} of rank 0; "
            f"the table of {each.table_bytes / 1e3:.0f} kB came {each.table_bytes_sent / each.table_bytes:.0f} times",
        )
    messages = MESSAGES_OF_RANK * (most_ranks - 1) + _messages_of_rank_0(most_ranks)
    rows.append(
        f"  Calculated from the last line: {messages:,} messages of {most_ranks:,} ranks take {messages / rate:.1f} s"
    )
    return "\n".join(rows)


def _text_of_aims(aims: Sequence[Aim]) -> str:
    rows = ["\nAims"]
    for aim in aims:
        verdict = "met" if aim.is_met else "MISSED"
        rows.append(f"  {verdict:<7}{aim.what} {aim.limit:g} {aim.unit}: {aim.found:.2f} {aim.unit}".rstrip())
    return "\n".join(rows)


if __name__ == "__main__":
    main()
