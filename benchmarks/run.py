"""``make bench``: saves and loads against the device's own limit and other libraries, on one state, in one run.

Prints medians with their ranges and what was aimed at; asserts nothing about them.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator

import savers
from async_sections import (
    AsyncOptions,
    measure_async_one_tensor,
    measure_async_slowdown,
    measure_async_small_tensors,
    measure_async_training_state,
)
from command_section import measure_command
from ranks_sections import RankOptions, measure_ranks
from report import AnySection, as_json, machine_facts, machine_text, text_of
from sections import (
    Rounds,
    files_of_savers,
    measure_cold_loads,
    measure_mapping,
    measure_memory,
    measure_saves,
    measure_small_tensors,
    measure_warm_loads,
    remove_files,
)
from states import training_state

CHOICES = ("memory", "save", "load", "small", "async", "command", "ranks")
ASYNC_PARTS = ("training", "tensor", "small", "slowdown")
MOST_SMALL_ROUNDS = 2
LIBRARIES = ("torch", "lastgood", "safetensors", "fastsafetensors", "torch-checkpointing")
FILES_AT_ONCE = 5
COPIES_AT_ONCE = 9
"""Of a state in memory: with each asynchronous saver, the copy limit, the page cache and the memory touched before."""

QUICK_BYTES = 48 << 20
FILES_OF_RANKS_AT_ONCE = 3
COPIES_OF_RANKS_AT_ONCE = 7
"""Of the state of all ranks: in the trainings, staged by each asynchronous saver, to load into, in the page cache, and
the memory touched before."""

MEMORY_OF_RANK_PROCESSES = 4 << 30
"""Each rank and the process of each of its asynchronous savers has imported torch."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def main() -> None:
    options = _options()
    _require_room(options)
    machine = machine_facts(options.directory, LIBRARIES)
    machine["free memory"] = "touched before each call" if options.touch_memory else "as found"
    print(machine_text(machine), flush=True)
    done = []
    with tempfile.TemporaryDirectory(prefix=".lastgood-bench-", dir=options.directory) as directory:
        for section in _measure(options, directory):
            print(text_of(section), flush=True)
            done.append(section)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(as_json(machine, done), file, indent=1)


def _measure(options: argparse.Namespace, directory: str) -> Iterator[AnySection]:
    wanted = [options.only] if options.only else CHOICES
    if {"memory", "save", "load"} & set(wanted):
        yield from _measure_training_state(options, wanted, directory)
    if "small" in wanted:
        rounds = Rounds(min(options.rounds, MOST_SMALL_ROUNDS), options.touch_memory)
        yield from measure_small_tensors(directory, rounds)
    if "async" in wanted:
        yield from _measure_async(options, directory)
    if "command" in wanted:
        yield measure_command(directory, options.small_tensors, options.rounds)
    if "ranks" in wanted:
        nbytes, rounds = (QUICK_BYTES, 1) if options.quick else (options.size, options.rounds)
        yield from measure_ranks(RankOptions(directory, nbytes, rounds, options.touch_memory and not options.quick))


def _measure_async(options: argparse.Namespace, directory: str) -> Iterator[AnySection]:
    wanted = options.async_part or ASYNC_PARTS
    how = AsyncOptions(
        directory, options.size, options.small_tensors, options.tensor_size, options.rounds, options.touch_memory
    )
    if "training" in wanted:
        yield from measure_async_training_state(how)
    if "tensor" in wanted:
        yield from measure_async_one_tensor(how)
    if "small" in wanted:
        yield from measure_async_small_tensors(how)
    if "slowdown" in wanted:
        yield measure_async_slowdown(how)


def _measure_training_state(options: argparse.Namespace, wanted: Iterable[str], directory: str) -> Iterator[AnySection]:
    state = training_state(options.size)
    rounds = Rounds(options.rounds, options.touch_memory)
    if "memory" in wanted:
        yield measure_memory(state, directory)
    if "save" in wanted:
        yield measure_saves(state, directory, rounds)
    if "load" in wanted:
        files = files_of_savers(list(savers.SAVERS), state, directory)
        yield measure_cold_loads(state, files, rounds)
        yield measure_warm_loads(state, files, rounds)
        yield measure_mapping(state, files, rounds)
        remove_files(files)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench", description="Compare saves and loads; ARGS='...' passes options."
    )
    parser.add_argument("--size", type=_bytes, default=2**30, help="of the training state, such as 256M (default: 1G)")
    parser.add_argument(
        "--rounds", type=_positive, default=5, help="measured rounds (default: 5; small tensors: at most 2)"
    )
    parser.add_argument("--only", choices=CHOICES, help="one part instead of all")
    parser.add_argument("--async-part", action="append", choices=ASYNC_PARTS, help="one part of async instead of all")
    parser.add_argument(
        "--tensor-size", type=_bytes, default=2**31, help="of the one large tensor that async saves (default: 2G)"
    )
    parser.add_argument(
        "--small-tensors", type=_positive, default=100_000, help="how many async and command have (default: 100000)"
    )
    parser.add_argument("--quick", action="store_true", help="ranks: one round, small state: does it work?")
    parser.add_argument("--directory", default=".", help="where to write, on the disk in question (default: here)")
    parser.add_argument(
        "--memory-as-found",
        dest="touch_memory",
        action="store_false",
        help="do not touch and free memory before each call (see docs/performance.md)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all samples to this file too")
    options = parser.parse_args()
    if not os.path.isdir(options.directory):
        parser.error(f"{options.directory} is not a directory")
    return options


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds")
    return int(text)


def _require_room(options: argparse.Namespace) -> None:
    """End with a clear message if the disk or the memory is too small for what was asked for."""
    disk, memory = 0, 0
    if options.only not in ("async", "ranks"):
        disk = memory = FILES_AT_ONCE * options.size
    if options.only in (None, "async"):
        parts = options.async_part or ASYNC_PARTS
        largest = max(options.size * ("training" in parts), options.tensor_size * ("tensor" in parts))
        disk = max(disk, 2 * largest)
        memory = max(memory, COPIES_AT_ONCE * largest)
    if options.only in (None, "ranks"):
        nbytes = QUICK_BYTES if options.quick else options.size
        disk = max(disk, FILES_OF_RANKS_AT_ONCE * nbytes)
        memory = max(memory, COPIES_OF_RANKS_AT_ONCE * nbytes + MEMORY_OF_RANK_PROCESSES)
    for kind, needed, free in (
        ("disk", disk, shutil.disk_usage(options.directory).free),
        ("memory", memory, _available_memory()),
    ):
        if free < needed:
            sys.exit(
                f"{free / 1e9:.1f} GB of {kind} are free, and {needed / 1e9:.1f} GB are needed: "
                "give a smaller --size or --tensor-size"
            )


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


if __name__ == "__main__":
    main()
