"""Jobs that are made of several runs do not go on from one that failed or was stopped."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from curation.distributed.stopping import Interrupted
from jobs import benchmark
from jobs.command import ended
from jobs.exit_codes import EXIT_STOPPED


class Run(NamedTuple):
    """An account."""

    failures: list[str]
    stopped: str | None


def test_nothing_goes_on_from_a_run_that_failed_or_was_stopped() -> None:
    ended(Run([], None), of="jest, seed 0")
    with pytest.raises(RuntimeError, match="jest, seed 0: a shard is gone"):
        ended(Run(["a shard is gone", "another"], None), of="jest, seed 0")
    with pytest.raises(Interrupted, match="SIGTERM, in jest, seed 0"):
        ended(Run([], "SIGTERM"), of="jest, seed 0")


def test_a_benchmark_that_is_stopped_says_so_and_writes_no_figures(tmp_path, monkeypatch, capsys) -> None:
    def stopped(*, tiny: bool) -> dict[str, object]:
        ended(Run([], "SIGTERM"), of=f"seed 1, tiny {tiny}")
        return {}

    monkeypatch.setitem(benchmark.BENCHMARKS, "metrics", stopped)
    assert benchmark.main(["metrics", "--tiny", "--json", str(tmp_path / "figures.json")]) == EXIT_STOPPED
    assert "stopped: SIGTERM, in seed 1, tiny True" in capsys.readouterr().err
    assert not (tmp_path / "figures.json").exists()
