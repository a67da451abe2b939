"""The fuzz targets on all that the corpus holds; and fuzzing itself, where atheris is installed."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.helpers.workers import Worker
from tests.hostile.fuzzing import CORPUS, HAS_ATHERIS, TARGETS, watched

ROOT = Path(__file__).parents[2]
FUZZING_SECS = 60
MOST_BYTES = 200 * 1024

INPUTS = [pytest.param(file, id=f"{file.parent.name}/{file.name}") for file in sorted(CORPUS.glob("*/*"))]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.kill()


def replay(target: str, data: bytes) -> float:
    """In a worker: run one input through its target; returns how long it took."""
    check = importlib.import_module(f"tests.hostile.fuzz_{target}").check
    check(b"")  # what is imported late is not this input's doing
    started = time.monotonic()
    watched(check)(data)
    return time.monotonic() - started


@pytest.mark.parametrize("file", INPUTS)
def test_what_fuzzing_has_found_stays_found(
    worker: Worker, count_cases: Callable[[str, int], None], file: Path
) -> None:
    seconds = worker.call(replay, file.parent.name, file.read_bytes())
    assert seconds < 10
    count_cases("inputs in the corpus of the fuzzer", 1)


def test_the_corpus_is_small_and_has_seeds_for_each_target() -> None:
    assert {file.parent.name for file in CORPUS.glob("*/*")} == set(TARGETS)
    assert sum(file.stat().st_size for file in CORPUS.glob("*/*")) < MOST_BYTES


def fuzz(target: str, directory: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    """Fuzz in a process of its own; inputs that fail are left in the directory."""
    command = [sys.executable, "-m", f"tests.hostile.fuzz_{target}", "--fuzzing", str(directory)]
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={directory}/failed-", "-print_final_stats=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds + 60
    )


@pytest.mark.crash
@pytest.mark.timeout(FUZZING_SECS + 90)
@pytest.mark.skipif(not HAS_ATHERIS, reason="needs the fuzzer atheris: pip install atheris")
@pytest.mark.parametrize("target", TARGETS)
def test_fuzzing_finds_nothing(tmp_path: Path, count_cases: Callable[[str, int], None], target: str) -> None:
    done = fuzz(target, tmp_path, FUZZING_SECS)
    failed = {file.name: file.read_bytes() for file in tmp_path.glob("failed-*")}
    assert done.returncode == 0, (failed, done.stdout[-3000:], done.stderr[-3000:])
    (executed,) = (line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line)
    count_cases("inputs that the fuzzer made up", int(executed))
