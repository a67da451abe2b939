"""From samples to printed tables: medians, ranges, and what was aimed at. Everything printed is computed here."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timing import Results, Samples


@dataclass(frozen=True)
class Aim:
    """``ours`` is to be at least ``at_least`` times as fast as the fastest of ``theirs``."""

    ours: str
    theirs: tuple[str, ...]
    at_least: float


@dataclass(frozen=True)
class Section:
    """One table: results of one set of rounds over ``nbytes`` of data."""

    key: str
    title: str
    nbytes: int
    results: Results
    aims: Sequence[Aim]

    moves_data: bool = True
    """Whether bytes a second say anything."""

    left_out: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""


@dataclass(frozen=True)
class MemorySection:
    """Extra peak memory in bytes by name, and what is aimed at for some of the names."""

    nbytes: int
    extra: dict[str, int]
    at_most: dict[str, int] = field(default_factory=dict)
    key: str = "memory"


@dataclass(frozen=True)
class Comparison:
    """An aim beside what this run says about it: the ratio of speeds in each round."""

    aim: Aim
    reference: str
    ratios: list[float]

    @property
    def verdict(self) -> str:
        """Met or missed by the median."""
        if statistics.median(self.ratios) >= self.aim.at_least:
            return "met"
        return "missed, but some rounds met it" if max(self.ratios) >= self.aim.at_least else "missed"


def compare(aim: Aim, results: Results) -> Comparison:
    """Round by round: how many times as fast as the reference. The reference is the one with the best median."""
    measured = [name for name in aim.theirs if name in results]
    reference = min(measured, key=lambda name: statistics.median(results[name].seconds))
    pairs = zip(results[aim.ours].seconds, results[reference].seconds, strict=True)
    return Comparison(aim, reference, [theirs / ours for ours, theirs in pairs])


def section_text(section: Section) -> str:
    """The table of a section, and its aims."""
    rows = [("", "median", "min - max", "CPU", "speed" if section.moves_data else "")]
    for name, samples in section.results.items():
        median = statistics.median(samples.seconds)
        rows.append(
            (
                name,
                _seconds(median),
                f"{_seconds(min(samples.seconds))} - {_seconds(max(samples.seconds))}",
                _seconds(statistics.median(samples.cpu_seconds)),
                f"{section.nbytes / median / 1e9:.2f} GB/s" if section.moves_data else "",
            )
        )
    rounds = max((len(samples.seconds) for samples in section.results.values()), default=0)
    lines = [f"{section.title} ({_megabytes(section.nbytes)} of tensors; rounds: {rounds})"]
    lines += _table(rows, figures=(1, 2, 3, 4))
    comparable = [
        aim for aim in section.aims if aim.ours in section.results and set(aim.theirs) & section.results.keys()
    ]
    if comparable:
        aims = [("speed of", "against that of", "aimed at", "this run", "min - max", "")]
        for aim in comparable:
            found = compare(aim, section.results)
            aims.append(
                (
                    aim.ours,
                    found.reference,
                    f"{aim.at_least:.2f}",
                    f"{statistics.median(found.ratios):.2f}",
                    f"{min(found.ratios):.2f} - {max(found.ratios):.2f}",
                    found.verdict,
                )
            )
        lines += ["", *_table(aims, figures=(2, 3, 4))]
    lines += [f"  left out: {name} ({reason})" for name, reason in section.left_out.items()]
    return "\n".join([*lines, ""])


def memory_text(section: MemorySection) -> str:
    """The table of peaks."""
    rows = [("", "extra peak", "aim", "")]
    for name, extra in section.extra.items():
        limit = section.at_most.get(name)
        aim = "" if limit is None else f"at most {_mebibytes(limit)}"
        verdict = "" if limit is None else ("met" if extra <= limit else "missed")
        rows.append((name, _mebibytes(extra), aim, verdict))
    return "\n".join(
        [f"extra peak memory ({section.nbytes / 1e6:,.1f} MB of tensors)", *_table(rows, figures=(1,)), ""]
    )


def as_json(machine: dict[str, str], sections: Sequence[Section | MemorySection]) -> dict[str, Any]:
    """All samples, for other programs."""
    found: dict[str, Any] = {"machine": machine}
    for section in sections:
        if isinstance(section, MemorySection):
            found[section.key] = {"nbytes": section.nbytes, "extra_peak_bytes": section.extra}
        else:
            found[section.key] = {"nbytes": section.nbytes, "results": _samples_as_json(section.results)}
    return found


def _samples_as_json(results: dict[str, Samples]) -> dict[str, Any]:
    return {name: {"seconds": samples.seconds, "cpu_seconds": samples.cpu_seconds} for name, samples in results.items()}


def machine_facts(directory: str, libraries: Sequence[str]) -> dict[str, str]:
    """What the figures belong to."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = {
        "processor": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "file system": _file_system(directory),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for name in libraries:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed, left out"
    return facts


def machine_text(facts: dict[str, str]) -> str:
    """One fact a line."""
    return "\n".join([*_table(list(facts.items())), ""])


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: str) -> str:
    """The type of the file system that holds ``directory``."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == number:
                return kind.split()[0]
    return "unknown"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def _table(rows: Sequence[Sequence[str]], *, figures: Sequence[int] = ()) -> list[str]:
    """Columns as wide as they need to be; those numbered in ``figures`` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in figures else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
