"""The smallest sizes of doctor and scale, which prove the commands and measure nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmarks import doctor, scale

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_doctor_has_a_verdict_on_each_node_and_on_all_together(tmp_path: Path) -> None:
    told = doctor.benchmark(output=str(tmp_path), tiny=True)
    names = {check["name"].rpartition(": ")[2]: check["passed"] for check in told["checks"]}
    assert names.keys() == {"versions", "storage", "decoding", "GPU", "all-gather"}
    assert names["versions"] is True and names["GPU"] is None and told["nodes"] == 1


def test_scale_counts_every_shard_of_sleepers(tmp_path: Path) -> None:
    told = scale.benchmark(actors=[2], tiny=True)
    assert [(run["actors"], run["shards"]) for run in told["weak"] + told["strong"]] == [(2, 12), (2, 12)]
    assert all(0 < run["efficiency"] <= 1.05 for run in told["weak"])
