"""One sample run and its page for all tests of the report."""

from pathlib import Path

import pytest
from tests.report import sample_run

from lastgood.cli._report.data import Report
from lastgood.cli._report.gather import Wanted, gather
from lastgood.cli._report.page import render


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_run.build(tmp_path_factory.mktemp("report") / "gpt-run")


@pytest.fixture(scope="session")
def report(run_root: Path) -> Report:
    return gather(str(run_root), Wanted())


@pytest.fixture(scope="session")
def page(report: Report, run_root: Path) -> Path:
    path = run_root.parent / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path
