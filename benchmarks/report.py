"""From samples to printed tables: medians, ranges, and what was aimed at. Everything printed is computed here."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
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
class AtMost:
    """``ours`` is to take no more than ``limit``, whatever the others take."""

    ours: str
    limit: float


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

    at_most: Sequence[AtMost] = ()
    """Aims in seconds."""


@dataclass(frozen=True)
class MemorySection:
    """Extra peak memory in bytes by name, and what is aimed at for some of the names."""

    nbytes: int
    extra: dict[str, int]
    at_most: dict[str, int] = field(default_factory=dict)
    key: str = "memory"
    title: str = "extra peak memory"
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SlowdownSection:
    """What a training loop loses by each save, in steps by name; and what is aimed at."""

    key: str
    title: str
    nbytes: int
    step_seconds: list[float]
    """Of one step without any saves."""

    lost_steps: dict[str, list[float]]
    at_most: Sequence[AtMost]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenSection:
    """What each rank has written during one save, by name of the saver; and the size of the files that are there."""

    key: str
    title: str
    nbytes: int
    """Of the state, whatever several ranks hold counted once."""

    by_rank: dict[str, list[int]]
    in_files: dict[str, int]
    at_most: Mapping[str, int] = field(default_factory=dict)
    """Aims for all ranks together."""

    left_out: Mapping[str, str] = field(default_factory=dict)


AnySection = Section | MemorySection | SlowdownSection | WrittenSection


@dataclass(frozen=True)
class Comparison:
    """An aim beside what this run says about it: the ratio of speeds in each round."""

    aim: Aim
    reference: str
    ratios: list[float]

    @property
    def verdict(self) -> str:
        """Met or missed by the median."""
        return _verdict(ratio >= self.aim.at_least for ratio in (statistics.median(self.ratios), *self.ratios))


def compare(aim: Aim, results: Results) -> Comparison:
    """Round by round: how many times as fast as the reference. The reference is the one with the best median, and
    where the two have other rounds, that median is what each round is compared with."""
    measured = [name for name in aim.theirs if name in results]
    reference = min(measured, key=lambda name: statistics.median(results[name].seconds))
    ours, theirs = results[aim.ours].seconds, results[reference].seconds
    if len(ours) != len(theirs):
        theirs = [statistics.median(theirs)] * len(ours)
    return Comparison(aim, reference, [their / our for our, their in zip(ours, theirs, strict=True)])


def _verdict(met: Iterable[bool]) -> str:
    """By whether the median meets the aim, and then the rounds."""
    by_median, *by_rounds = met
    if by_median:
        return "met"
    return "missed, but some rounds met it" if any(by_rounds) else "missed"


def section_text(section: Section) -> str:
    """The table of a section, and its aims."""
    has_cpu = any(samples.cpu_seconds for samples in section.results.values())
    rows = [("", "median", "min - max", "CPU" if has_cpu else "", "speed" if section.moves_data else "")]
    for name, samples in section.results.items():
        median = statistics.median(samples.seconds)
        rows.append(
            (
                name,
                _seconds(median),
                f"{_seconds(min(samples.seconds))} - {_seconds(max(samples.seconds))}",
                _seconds(statistics.median(samples.cpu_seconds)) if samples.cpu_seconds else "",
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
    results = {name: samples.seconds for name, samples in section.results.items()}
    lines += _at_most_lines("time of", section.at_most, results, _seconds)
    lines += _left_out_lines(section.left_out)
    return "\n".join([*lines, ""])


def slowdown_text(section: SlowdownSection) -> str:
    """The table of lost steps, and the aims."""
    rows = [("", "median", "min - max")]
    for name, lost in section.lost_steps.items():
        rows.append((name, _steps(statistics.median(lost)), f"{_steps(min(lost))} - {_steps(max(lost))}"))
    step = _seconds(statistics.median(section.step_seconds))
    rounds = max((len(lost) for lost in section.lost_steps.values()), default=0)
    lines = [f"{section.title} (state: {_megabytes(section.nbytes)}; a step: {step}; rounds: {rounds})"]
    lines += _table(rows, figures=(1, 2))
    lines += _at_most_lines("lost by", section.at_most, section.lost_steps, _steps)
    lines += _left_out_lines(section.left_out)
    return "\n".join([*lines, ""])


def _at_most_lines(
    heading: str, aims: Sequence[AtMost], results: Mapping[str, Sequence[float]], shown: Callable[[float], str]
) -> list[str]:
    rows = [(heading, "at most", "this run", "min - max", "")]
    for aim in aims:
        if found := results.get(aim.ours):
            median = statistics.median(found)
            verdict = _verdict(value <= aim.limit for value in (median, *found))
            between = f"{shown(min(found))} - {shown(max(found))}"
            rows.append((aim.ours, shown(aim.limit), shown(median), between, verdict))
    return ["", *_table(rows, figures=(1, 2, 3))] if len(rows) > 1 else []


def _left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    return [f"  left out: {name} ({reason})" for name, reason in left_out.items()]


def text_of(section: AnySection) -> str:
    """What is printed of a section."""
    if isinstance(section, MemorySection):
        return memory_text(section)
    if isinstance(section, WrittenSection):
        return written_text(section)
    return slowdown_text(section) if isinstance(section, SlowdownSection) else section_text(section)


def memory_text(section: MemorySection) -> str:
    """The table of peaks."""
    rows = [("", "extra peak", "aim", "")]
    for name, extra in section.extra.items():
        limit = section.at_most.get(name)
        aim = "" if limit is None else f"at most {_mebibytes(limit)}"
        verdict = "" if limit is None else ("met" if extra <= limit else "missed")
        rows.append((name, _mebibytes(extra), aim, verdict))
    return "\n".join(
        [
            f"{section.title} ({_megabytes(section.nbytes)} of tensors)",
            *_table(rows, figures=(1,)),
            *_left_out_lines(section.left_out),
            "",
        ]
    )


def written_text(section: WrittenSection) -> str:
    """The table of bytes. Something that was written twice shows in what all ranks have written beyond the state."""
    rows = [("", "all ranks", "over the state", "each rank", "files", "aim", "")]
    for name, by_rank in section.by_rank.items():
        written, limit = sum(by_rank), section.at_most.get(name)
        rows.append(
            (
                name,
                _megabytes(written),
                f"{written / section.nbytes - 1:+.2%}",
                f"{_megabytes(min(by_rank))} - {_megabytes(max(by_rank))}",
                _megabytes(section.in_files[name]),
                "" if limit is None else f"at most {_megabytes(limit)}",
                "" if limit is None else _verdict([written <= limit]),
            )
        )
    lines = [f"{section.title} ({_megabytes(section.nbytes)} of tensors)", *_table(rows, figures=(1, 2, 3, 4))]
    return "\n".join([*lines, *_left_out_lines(section.left_out), ""])


def as_json(machine: dict[str, str], sections: Sequence[AnySection]) -> dict[str, Any]:
    """All samples, for other programs."""
    found: dict[str, Any] = {"machine": machine}
    for section in sections:
        if isinstance(section, MemorySection):
            found[section.key] = {"nbytes": section.nbytes, "extra_peak_bytes": section.extra}
        elif isinstance(section, WrittenSection):
            found[section.key] = {
                "nbytes": section.nbytes,
                "written_bytes_by_rank": section.by_rank,
                "bytes_in_files": section.in_files,
            }
        elif isinstance(section, SlowdownSection):
            found[section.key] = {
                "nbytes": section.nbytes,
                "step_seconds": section.step_seconds,
                "lost_steps": section.lost_steps,
            }
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


def _steps(value: float) -> str:
    return f"{value:.2f} steps"


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
