"""What is measured of several ranks that save and load together, against DCP, and what is aimed at."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ranks_work
from async_rounds import Laps
from ranks_pool import RankPool
from ranks_rounds import LoadEntry, RankResults, RankRounds, RankSaves, measure_loads
from ranks_savers import (
    DCP,
    DCP_ASYNC_SAVERS,
    DCP_LOAD,
    DCP_SYNC_SAVERS,
    LASTGOOD,
    LASTGOOD_ASYNC,
    LASTGOOD_LOAD,
    OURS,
    SAVERS,
)
from ranks_states import COLUMNS, GRID, SAME
from report import Aim, AnySection, Section, WrittenSection
from sections import write_limits
from timing import Results, Samples, progress

RANKS = 4
FEWER_RANKS = 2
REPLICAS = 2
SHARE_WITH_REPLICAS = 8
"""The state under HSDP is that much smaller: just its bytes are counted."""

MOST_FIRST_SAVES = 3
TIMES_AS_FAST_UNTIL_DURABLE = 2.0
LAYOUTS = {
    "same layout": (RANKS, SAME),
    "4 ranks, by columns": (RANKS, COLUMNS),
    "2 x 2 ranks, rows and columns": (RANKS, GRID),
    "2 ranks, by rows": (FEWER_RANKS, SAME),
}


@dataclass(frozen=True)
class RankOptions:
    """Sizes, rounds, and what a single save or load may take."""

    directory: str
    nbytes: int
    rounds: int
    touch_memory: bool
    timeout: float = 240.0


def measure_ranks(options: RankOptions) -> Iterator[AnySection]:
    """Saves of four ranks, then loads by as many and by fewer."""
    touched = options.nbytes + options.nbytes // 4 if options.touch_memory else 0
    how = RankRounds(min(options.rounds, MOST_FIRST_SAVES), options.rounds, options.timeout, touched)
    with RankPool(RANKS, options.directory, options.timeout) as pool:
        yield _replicas_section(pool, options)
        progress(f"{RANKS} ranks: building the state")
        nbytes = pool.call(ranks_work.build, options.nbytes, 1)[0]
        limits = write_limits(nbytes, os.path.join(options.directory, "limit"))
        results = RankSaves(f"{RANKS} ranks", pool, options.directory, how).run(list(SAVERS), limits)
        yield from _save_sections(nbytes, results)
        yield _written_section("ranks_written", f"bytes that {RANKS} ranks write", nbytes, results)
        with RankPool(FEWER_RANKS, options.directory, options.timeout) as fewer:
            fewer.call(ranks_work.build, options.nbytes, 1)
            yield from _load_sections({RANKS: pool, FEWER_RANKS: fewer}, nbytes, options.directory, how)


def _replicas_section(pool: RankPool, options: RankOptions) -> WrittenSection:
    """HSDP: two groups of ranks hold the same, and each byte is to be written once all the same.

    This comes first: it brings the imports, thread pools and first touches that no measured save is to pay for.
    """
    nbytes = pool.call(ranks_work.build, options.nbytes // SHARE_WITH_REPLICAS, REPLICAS)[0]
    once = RankRounds(1, 0, options.timeout, 0)
    results = RankSaves(f"{RANKS} ranks, HSDP", pool, options.directory, once).run(list(SAVERS))
    title = f"bytes that {RANKS} ranks write, {REPLICAS} of which hold each of them (HSDP)"
    return _written_section("ranks_written_replicas", title, nbytes, results)


def _written_section(key: str, title: str, nbytes: int, results: RankResults) -> WrittenSection:
    by_rank = {name: written.by_rank for name, written in results.written.items()}
    in_files = {name: written.in_files for name, written in results.written.items()}
    theirs = [sum(by_rank[name]) for name in (*DCP_SYNC_SAVERS, *DCP_ASYNC_SAVERS) if name in by_rank]
    at_most = dict.fromkeys(OURS, min(theirs)) if theirs else {}
    return WrittenSection(key, title, nbytes, by_rank, in_files, at_most, results.left_out)


def _save_sections(nbytes: int, results: RankResults) -> Iterator[Section]:
    """Until durable, first saves apart; until an asynchronous save returns, and until training may go on."""

    def section(
        key: str,
        title: str,
        laps: Mapping[str, Sequence[Laps]],
        phase: Callable[[Laps], float],
        aims: Sequence[Aim],
        names: Sequence[str] = tuple(SAVERS),
    ) -> Section:
        is_durable = key.startswith("ranks_durable")
        rows = {
            name: Samples([phase(each) for each in laps[name]], [each.cpu for each in laps[name]] if is_durable else [])
            for name in names
            if name in laps
        }
        if key == "ranks_durable":
            rows = results.limits | rows
        left_out = results.left_out if key == "ranks_durable" else {}
        title = f"{RANKS} ranks under FSDP2, {title}"
        return Section(key, title, nbytes, rows, aims, moves_data=is_durable, left_out=left_out)

    durable = [
        Aim(LASTGOOD, DCP_SYNC_SAVERS, TIMES_AS_FAST_UNTIL_DURABLE),
        Aim(LASTGOOD_ASYNC, DCP_ASYNC_SAVERS, TIMES_AS_FAST_UNTIL_DURABLE),
    ]
    never_slower = [Aim(LASTGOOD_ASYNC, DCP_ASYNC_SAVERS, 1.0)]
    asynchronous = (LASTGOOD_ASYNC, *DCP_ASYNC_SAVERS)
    first, later = results.first, results.later
    yield section("ranks_durable", "later saves: until durable", later, lambda laps: laps.durable, durable)
    yield section("ranks_durable_first", "first save: until durable", first, lambda laps: laps.durable, durable)
    for key, when, found in (("", "later saves", later), ("_first", "first save", first)):
        title = f"{when}: until save returns"
        yield section(f"ranks_returned{key}", title, found, lambda laps: laps.returned, never_slower, asynchronous)
        title = f"{when}: until training may change the state"
        yield section(f"ranks_staged{key}", title, found, lambda laps: laps.staged, never_slower, asynchronous)


def _load_sections(pools: Mapping[int, RankPool], nbytes: int, directory: str, how: RankRounds) -> Iterator[Section]:
    """In place into each layout, with nothing in the page cache and with everything."""
    paths = {LASTGOOD_LOAD: os.path.join(directory, "by-lastgood"), DCP_LOAD: os.path.join(directory, "by-dcp")}
    for loader, saver in ((LASTGOOD_LOAD, LASTGOOD), (DCP_LOAD, DCP)):
        pools[RANKS].call(ranks_work.open_saver, saver)
        pools[RANKS].call(ranks_work.save, saver, paths[loader], how.timeout)
        pools[RANKS].call(ranks_work.close_saver, saver)
    names = (LASTGOOD_LOAD, DCP_LOAD)
    for cold in (True, False):
        results: Results = {}
        left_out: dict[str, str] = {}
        aims = []
        kind = "cold" if cold else "warm"
        for layout, (ranks, place) in LAYOUTS.items():
            rows = [LoadEntry(f"{name}: {layout}", pools[ranks], name, paths[name], place) for name in names]
            found, missing = measure_loads(f"{RANKS} ranks, load, {kind}", rows, how, cold=cold)
            results |= found
            left_out |= missing
            aims.append(Aim(rows[0].name, (rows[1].name,), 1.0))
            pools[ranks].call(ranks_work.forget_targets)
        title = f"load in place of what {RANKS} ranks have saved, {kind} page cache"
        yield Section(f"ranks_load_{kind}", title, nbytes, results, aims, left_out=left_out)
    for path in paths.values():
        shutil.rmtree(path)
