"""Where the real data is, and a clear word on what could not be run without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NO_REAL_DATA = "the real data is absent"


@pytest.fixture(scope="session")
def real_data(pytestconfig: pytest.Config) -> Path:
    """The folder of real pools: CURATION_TEST_DATA, else ../shared/data beside the repository.

    Where it is absent the test is skipped and listed at the end of the run; under CI it fails.
    """
    named = os.environ.get("CURATION_TEST_DATA")
    folder = Path(named) if named else pytestconfig.rootpath.parent / "shared" / "data"
    if folder.is_dir():
        return folder.resolve()
    message = f"{NO_REAL_DATA}: no folder {folder} (set CURATION_TEST_DATA)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the tests that were not run for want of the real data."""
    not_run = [
        report.nodeid for report in terminalreporter.getreports("skipped") if NO_REAL_DATA in str(report.longrepr)
    ]
    if not_run:
        terminalreporter.section(f"NOT RUN: {NO_REAL_DATA}", yellow=True)
        for nodeid in not_run:
            terminalreporter.write_line(nodeid)
        terminalreporter.write_line("Set CURATION_TEST_DATA to the folder of real pools to run them.")
