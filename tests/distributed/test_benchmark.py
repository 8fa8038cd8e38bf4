"""The benchmarks at their smallest size: the commands work, and both sides of a race did the same work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jobs import benchmark
from jobs.benchmarks import decode, embed, ingest, race
from jobs.benchmarks.embed import steady_rate
from jobs.demo_pool import make_pool
from jobs.demo_scenes import make_pairs
from jobs.demo_tasks import TASKS


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


def tiny(name: str, tmp_path: Path, *more: str) -> dict:
    assert benchmark.main([name, "--tiny", "--json", str(tmp_path / "figures.json"), *more]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def test_a_flag_that_no_named_benchmark_takes_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["select", "decode", "--track", "cifar10"])
    assert "select, decode: no benchmark for --track" in capsys.readouterr().err


@pytest.mark.slow
def test_select_races_two_sides_that_choose_the_same_rows(tmp_path: Path) -> None:
    figures = tiny("select", tmp_path)
    assert figures["same_rows"] == 1.0
    assert figures["speedup"]["median"] > 0 and figures["overhead"] > 0


@pytest.mark.slow
def test_feed_races_two_loops_over_the_same_shards(tmp_path: Path) -> None:
    figures = tiny("feed", tmp_path)
    assert len(figures["ours"]) == len(figures["loop"]) == 1 and figures["ratio"]["median"] > 0


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo's pool is made once, for every benchmark that runs on it."""
    return tmp_path_factory.mktemp("demo")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_race_measures_every_arm_on_the_same_held_out_pairs(tmp_path: Path, demo_folder: Path) -> None:
    figures = tiny("race", tmp_path, "--folder", str(demo_folder))
    assert {name: arm["method"] for name, arm in figures["arms"].items()} == {
        "jest": "jest",
        "uniform": "uniform",
        "uniform equal flops": "uniform",
        "uniform equal loaded": "uniform",
    }
    steps = {name: arm["steps"] for name, arm in figures["arms"].items()}
    assert steps["jest"] == steps["uniform"] and steps["uniform equal loaded"] == 5 * steps["jest"]
    # 8/3 of JEST's steps pay its scoring; the reference and its cache come on top.
    assert steps["uniform equal flops"] > 8 / 3 * steps["jest"]
    assert all(0 <= figures["end"][name]["mean"] <= 1 for name in steps)
    assert (demo_folder / "demo" / "race.png").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_online_measures_arms_by_retrieval_by_tasks_and_by_what_they_cost(tmp_path: Path, demo_folder: Path) -> None:
    names = ["flexi", "curated set"]
    figures = tiny("online", tmp_path, "--folder", str(demo_folder), "--arms", *names)
    assert list(figures["arms"]) == names
    for arm in figures["arms"].values():
        assert all(0 <= arm[of]["mean"] <= 1 for of in ("metric", "idle_share", *TASKS))
    flexi, curated = (figures["arms"][name] for name in names)
    assert curated["junk_share"]["mean"] == 0 < flexi["junk_share"]["mean"]
    # A quarter of the patches for five times as many rows scored, and for half of those trained.
    assert 1 < flexi["flops_per_step"]["mean"] / curated["flops_per_step"]["mean"] < 2
    assert set(figures["sub_batches_per_second_by_scoring_actors"]) == {"1", "2"}


def test_an_interval_is_students_and_a_single_seed_has_none() -> None:
    assert race.interval([1.0, 2.0, 3.0])["half_width"] == pytest.approx(4.303 / 3**0.5)
    assert race.interval([5.0]) == {"mean": 5.0, "half_width": None, "values": [5.0]}


def test_decode_races_the_same_jpegs_and_ours_all_go_the_fast_way() -> None:
    figures = decode.race(decode.jpegs(4, 90), pairs=1)
    assert figures["ratio"]["median"] > 1 and 20 < figures["mean_kilobytes"] < 80
    # With the normalisation, which the rival has in its figure already, ours does more and is slower.
    assert figures["ratio_with_our_normalisation"]["median"] < figures["ratio"]["median"]


def test_the_score_difference_is_told_of_pairs_that_were_scored_both_ways() -> None:
    scores = decode.Scores(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), np.array([0.1, 0.2, 0.3, 0.61, 0.5, 0.4]))
    figures = decode.told("six rows", scores)
    assert figures["mean_difference"] == pytest.approx((0.21 + 0.2) / 6)
    assert figures["mean_shift"] == pytest.approx(0.01 / 6)
    assert figures["kept_in_both"] == 0.5  # of the two best, 0.6 and 0.5, one is still there


def test_ingest_compares_readers_that_give_the_same_members(tmp_path: Path) -> None:
    images = [pair.image for pair in make_pairs(5)]
    url = str(tmp_path / "a.tar")
    Path(url).write_bytes(ingest.tar_of(images))
    ours = list(ingest.members([url]))
    theirs = [{k: v for k, v in row.items() if k not in ("__url__", "__local_path__")} for row in webdataset_rows(url)]
    assert ours == theirs and len(ours) == 5
    assert [sample.image for sample in ingest.samples([url])] == images


def webdataset_rows(url: str) -> list[dict]:
    return list(ingest.webdataset_samples([url]))


def test_of_a_damaged_shard_ours_accounts_for_every_sample_and_a_rival_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rays = [side for side in ingest.READERS if side.startswith("ray")]
    monkeypatch.delitem(ingest.READERS, rays[0])  # it takes a Ray of its own for each shard
    told = ingest.damages(tmp_path / "damaged", images=[pair.image for pair in make_pairs(7)])
    assert [(shard["begun"], shard["ours"]["out"]) for shard in told.values()] == [(200, 180), (200, 199), (151, 150)]
    assert all(
        sum(shard["ours"]["dropped"].values()) == shard["begun"] - shard["ours"]["out"] for shard in told.values()
    )
    assert told["10% broken images"]["webdataset, warn_and_continue"] == {"out": 180, "error": None}
