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
from report import MemorySection, Section, as_json, machine_facts, machine_text, memory_text, section_text
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

CHOICES = ("memory", "save", "load", "small")
MOST_SMALL_ROUNDS = 2
LIBRARIES = ("torch", "lastgood", "safetensors", "fastsafetensors")
FILES_AT_ONCE = 5
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def main() -> None:
    options = _options()
    _require_space(options.directory, options.size)
    machine = machine_facts(options.directory, LIBRARIES)
    machine["free memory"] = "touched before each call" if options.touch_memory else "as found"
    print(machine_text(machine), flush=True)
    done = []
    with tempfile.TemporaryDirectory(prefix=".lastgood-bench-", dir=options.directory) as directory:
        for section in _measure(options, directory):
            print(memory_text(section) if isinstance(section, MemorySection) else section_text(section), flush=True)
            done.append(section)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(as_json(machine, done), file, indent=1)


def _measure(options: argparse.Namespace, directory: str) -> Iterator[Section | MemorySection]:
    wanted = [options.only] if options.only else CHOICES
    if wanted != ["small"]:
        yield from _measure_training_state(options, wanted, directory)
    if "small" in wanted:
        rounds = Rounds(min(options.rounds, MOST_SMALL_ROUNDS), options.touch_memory)
        yield from measure_small_tensors(directory, rounds)


def _measure_training_state(
    options: argparse.Namespace, wanted: Iterable[str], directory: str
) -> Iterator[Section | MemorySection]:
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


def _require_space(directory: str, size: int) -> None:
    needed, free = FILES_AT_ONCE * size, shutil.disk_usage(directory).free
    if free < needed:
        sys.exit(
            f"{directory} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: give a smaller --size"
        )


if __name__ == "__main__":
    main()
