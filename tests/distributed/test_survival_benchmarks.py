"""The smallest sizes of doctor, scale and chaos, which prove the commands and measure nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.benchmarks import chaos, doctor, scale

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_session")
def test_doctor_has_a_verdict_on_each_node_and_on_all_together(tmp_path: Path) -> None:
    told = doctor.benchmark(output=str(tmp_path), tiny=True)
    names = {check["name"].rpartition(": ")[2]: check["passed"] for check in told["checks"]}
    assert names.keys() == {"versions", "storage", "decoding", "GPU", "all-gather"}
    assert names["versions"] is True and names["GPU"] is None and told["nodes"] == 1


@pytest.mark.usefixtures("ray_session")
def test_scale_counts_every_shard_of_sleepers(tmp_path: Path) -> None:
    told = scale.benchmark(actors=[2], tiny=True)
    assert [(run["actors"], run["shards"]) for run in told["weak"] + told["strong"]] == [(2, 12), (2, 12)]
    assert all(0 < run["efficiency"] <= 1.05 for run in told["weak"])
    assert [fed["ranks"] for fed in told["feed"]] == [1, 2] and all(0 < fed["efficiency"] <= 1 for fed in told["feed"])


@pytest.mark.alone
def test_chaos_kills_a_node_and_finds_the_bytes_of_a_run_without_harm() -> None:
    told = chaos.benchmark(minutes=0.0, seed=0, tiny=True, faults=["kill a node"])
    [one] = told["rounds"]
    assert one["passed"] and told["failed"] == 0, one
    assert (one["fault"], one["run"], one["exit"]) == ("kill a node", "curate", 0)
