"""What all tests share. torch is not imported here: a test that does without it should not pay for it."""

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

SEED_VARIABLE = "LASTGOOD_TEST_SEED"

# Time limits of hypothesis say more about what else the machine is doing than about the code: pytest's own
# time-out is the one that counts. A failure prints the line that reproduces it.
settings.register_profile(
    "default", deadline=None, print_blob=True, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
# CI judges a change: the same change gets the same examples. New examples are looked for everywhere else.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


@pytest.fixture
def rng_seed() -> int:
    """A seed for the random choices of one test: another one in every run, printed when the test fails.

    ``LASTGOOD_TEST_SEED`` in the environment sets it, to repeat a failure.
    """
    seed = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().getrandbits(32))
    # pytest shows what a test printed when it fails, and only then.
    print(f"random seed: to repeat, run with {SEED_VARIABLE}={seed}")
    return seed


_case_counts: Counter[str] = Counter()


@pytest.fixture(scope="session")
def count_cases() -> Callable[[str, int], None]:
    """Adds to a total that is printed at the end of the run: how many cases of something were tried."""

    def add(what: str, count: int) -> None:
        _case_counts[what] += count

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _case_counts:
        terminalreporter.section("cases tried")
        for what, count in sorted(_case_counts.items()):
            terminalreporter.line(f"{count:>9,} {what}")


# Several processes run the tests (pytest -n). Each takes a whole file at a time, as tests of one file share processes
# and files; those of several ranks, whose processes are many, all go to one. What takes longest goes first.


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "distributed" else str(item.path)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["case_counts"] = dict(_case_counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _case_counts.update(getattr(node, "workeroutput", {}).get("case_counts", {}))
