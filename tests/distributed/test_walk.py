"""The walk of docs/training.md, from a clean set and a pool to JEST and JEST++, by the commands themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import curate, fit, train
from tests.distributed.conftest import WriteShard

TRAIN = ["--train.sub-batch", "8", "--train.num-steps", "3", "--train.score-batch", "32", "--data.segment-rows", "8"]


def summary(run: Path) -> dict:
    return json.loads((run / "train" / "summary.json").read_text())


@pytest.mark.slow
def test_from_a_clean_set_and_a_pool_to_jest_and_jest_plus_plus(
    ray_session: None, tmp_path: Path, write_shard: WriteShard, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, pool, runs = tmp_path / "clean", tmp_path / "pool", tmp_path / "runs"
    write_shard(clean / "00000.tar", count=24, seed=1)
    for number in range(2):
        write_shard(pool / f"{number:05d}.tar", count=40, seed=2 + number)
    cpu = ["--compute.actors", "1"]
    assert curate.main(["debug", *cpu, "--pool.shards", f"{clean}/*.tar", "--output", f"{runs}/clean"]) == 0
    fitted = ["--train.cooldown", "0.5", "--train.floor", "0.1", *TRAIN]
    assert (
        fit.main(["reference", "debug", "--data.run", f"{runs}/clean", "--output", f"{runs}/reference", *fitted]) == 0
    )
    # The command that it prints is the next one of the walk.
    assert f"--embed.pretrained None --embed.checkpoint {runs}/reference/train/learner.pt" in capsys.readouterr().out
    model = ["--embed.pretrained", "None", "--embed.checkpoint", f"{runs}/reference/train/learner.pt"]
    on_pool = ["--pool.shards", f"{pool}/*.tar", *model]
    assert curate.main(["debug", *cpu, *on_pool, "--output", f"{runs}/pool"]) == 0
    several = ["--ledger.actors", "2", "--ledger.statistic", "ema"]
    arms = {"jest": several, "uniform": ["--method", "uniform", "--train.filter-ratio", "0"]}
    for name, flags in arms.items():
        assert train.main(["debug", "--data.run", f"{runs}/pool", "--output", f"{runs}/{name}", *TRAIN, *flags]) == 0
    assert (summary(runs / "jest")["samples_loaded"], summary(runs / "uniform")["samples_loaded"]) == (120, 24)
    assert summary(runs / "jest")["ledger"]["uses"] == 24

    best = '[{"method": {"name": "clip_score"}, "keep_fraction": 0.5}]'
    assert curate.main(["debug", *cpu, *on_pool, "--selection", best, "--output", f"{runs}/bootstrap"]) == 0
    both = f"{clean}/*.tar::{runs}/bootstrap/shards"
    assert curate.main(["debug", *cpu, "--pool.shards", both, "--output", f"{runs}/clean++"]) == 0
    assert json.loads((runs / "clean++" / "summary.json").read_text())["embedded"] == 24 + 40
    final = ["--data.run", f"{runs}/clean++", "--output", f"{runs}/reference++"]
    assert fit.main(["reference", "debug", *final, *TRAIN]) == 0
    assert (runs / "reference++" / "train" / "learner.pt").exists()
    steps = pq.read_table(runs / "reference" / "train" / "steps.parquet")
    assert steps["junk_share"].null_count == 3 and steps["step"].to_pylist() == [1, 2, 3]


def test_a_reference_is_trained_on_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["reference", "debug", "--data.run", str(tmp_path), "--output", str(tmp_path / "out"), "--method", "jest"]
    assert fit.main(given) == 2
    assert "a reference is trained on every row" in capsys.readouterr().err
