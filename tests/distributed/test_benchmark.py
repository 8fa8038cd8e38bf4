"""The benchmarks at their smallest size: the commands work, and both sides of a race did the same work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.benchmarks import embed
from jobs.benchmarks.embed import steady_rate
from jobs.demo_pool import make_pool


@pytest.mark.slow
def test_embed_races_two_sides_that_embed_the_same_number_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = make_pool(tmp_path / "pool", samples=400, samples_per_shard=100)
    figures = embed.race(pool.shards, tmp_path, pairs=1)
    assert [run["images"] for run in figures["ours"]] == [run["images"] for run in figures["rival"]] == [396]
    assert figures["steady_ratio"]["median"] > 0
    assert "ours / hand-written loop" in capsys.readouterr().out


def test_peak_memory_sees_what_a_child_of_the_process_holds() -> None:
    hold = "import time; held = bytearray(200 << 20); print('held', flush=True); time.sleep(60)"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", nest], stdout=subprocess.PIPE, text=True) as parent:
        peak = embed.PeakMemory(parent.pid, every_s=0.02)
        assert parent.stdout and parent.stdout.readline() == "held\n"
        deadline = time.monotonic() + 20
        while peak.mib < 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        peak.stop()
        for pid in reversed(embed.family(parent.pid)):
            os.kill(pid, signal.SIGKILL)
    assert 200 <= peak.mib < 400


def test_the_steady_rate_counts_the_rows_between_15_and_85_percent_only() -> None:
    slow_start = [(10.0 * i, 5) for i in range(3)]
    steady = [(20.0 + i, 5) for i in range(1, 15)]
    slow_end = [(34.0 + 10.0 * i, 5) for i in range(1, 4)]
    assert steady_rate(slow_start + steady + slow_end) == pytest.approx(5.0, rel=0.35)
    assert steady_rate([(float(i), 1) for i in range(100)]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="too few for a steady rate"):
        steady_rate([(0.0, 1)])
