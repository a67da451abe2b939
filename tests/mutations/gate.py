"""The mutation gate: takes one step that a promise rests on out of a copy of lastgood, and sees whether a test notices.

    python -m tests.mutations.gate              all of them, two at a time; prints a table and how long it took
    python -m tests.mutations.gate fsync CRC    those whose description holds one of these words

Ends with status 1 if one goes unnoticed. That the same tests pass on the source as it is, the tests themselves show.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.helpers.unmeasured import unmeasured_environment
from tests.mutations.mutation import Mutation
from tests.mutations.mutations import MUTATIONS

PROJECT = Path(__file__).parents[2]
SOURCE = PROJECT / "src" / "lastgood"
AT_ONCE = 2
_LONGEST_SECS = 900.0
_NOTICED, _UNNOTICED = 1, 0  # pytest's statuses: tests have failed, all is well


class Result(NamedTuple):
    """``noticed_by`` is the first test that failed; ``None`` if none did, and ``problem`` if that is not known."""

    mutation: Mutation
    noticed_by: str | None
    problem: str | None
    seconds: float


def mutated(mutation: Mutation) -> str:
    """The text of the file with the step taken out; ``ValueError`` if the step does not stand there just once."""
    text = (SOURCE / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.what}: {mutation.file} holds this {text.count(mutation.old)} times:\n{mutation.old}"
        )
    return text.replace(mutation.old, mutation.new)


def run_tests(source: Path, tests: Sequence[str], base: Path) -> tuple[int, str]:
    """Pytest's status and what it printed, for these tests on the package below ``source``."""
    # A copy's lines are not the source's: nobody measures which of them were run.
    environment = unmeasured_environment(PYTHONPATH=str(source), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={base}"]
    ended = subprocess.run(
        [*command, *tests],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LONGEST_SECS,
        check=False,
    )
    return ended.returncode, ended.stdout


def _try_aloud(mutation: Mutation) -> Result:
    """:func:`try_one`, and a line for whoever watches."""
    result = try_one(mutation)
    print(
        f"{result.seconds:4.0f} s  {mutation.what}: {result.noticed_by or result.problem or 'NOBODY NOTICED'}",
        file=sys.stderr,
    )
    return result


def try_one(mutation: Mutation) -> Result:
    """Run its tests on a copy of the package without the step."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lastgood-mutation-") as directory:
        source = Path(directory, "src")
        shutil.copytree(SOURCE, source / "lastgood", ignore=shutil.ignore_patterns("__pycache__"))
        (source / "lastgood" / mutation.file).write_text(mutated(mutation))
        try:
            status, printed = run_tests(source, mutation.tests, Path(directory, "pytest"))
        except subprocess.TimeoutExpired:
            return Result(mutation, None, f"no end within {_LONGEST_SECS:g} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if status == _NOTICED:
        failed = [line.split()[1] for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return Result(mutation, failed[0] if failed else "a test that ended the run", None, seconds)
    problem = None if status == _UNNOTICED else f"pytest ended with status {status}: {printed[-500:]}"
    return Result(mutation, None, problem, seconds)


def chosen(words: Sequence[str]) -> list[Mutation]:
    """Those that a word describes, or all."""
    every = [mutation for kind in MUTATIONS.values() for mutation in kind]
    return [each for each in every if not words or any(word.lower() in each.what.lower() for word in words)]


def table(results: Sequence[Result]) -> str:
    """In Markdown, for the page on crash safety."""
    lines = ["| without | in | noticed by |", "| --- | --- | --- |"]
    for result in results:
        noticed = result.noticed_by or f"**nobody** {result.problem or ''}"
        lines.append(f"| {result.mutation.what} | `{result.mutation.file}` | `{noticed.split('[')[0]}` |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    start, mutations = time.monotonic(), chosen(words)
    for mutation in mutations:
        mutated(mutation)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(_try_aloud, mutations))
    print(table(results))
    unnoticed = [result for result in results if result.noticed_by is None]
    took = time.monotonic() - start
    print(f"\n{len(results)} steps taken out one at a time, {len(results) - len(unnoticed)} noticed, in {took:.0f} s")
    return 1 if unnoticed or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
