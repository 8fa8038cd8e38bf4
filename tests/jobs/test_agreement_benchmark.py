"""Study X-1: its commands, which take long, are at least commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmarks.agreement import of_a_seed, of_the_pool


def test_every_command_of_the_study_has_flags_that_its_job_takes(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURATION_TEST_DATA", str(real_data))
    for job, arguments in (*of_the_pool(tmp_path), *of_a_seed(tmp_path, 0, tiny=True)):
        assert job([*arguments, "--dry-run"]) in (0, 2)  # no pool is there; an unknown flag would be a SystemExit
