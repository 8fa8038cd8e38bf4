"""A pool of scorers chooses what the workers would choose, ages by the rule, and loses nothing when a scorer dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curation.data.score_log import read_steps
from curation.distributed.ready_batches import Ready
from curation.distributed.scorer import part_of
from curation.distributed.train import train
from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, LowResolution, Remember, Train, Workers
from curation.training.learner import RowFlops
from curation.training.online import Chosen
from curation.training.picking import Picked, Stopwatch, SubBatch


def recipe_for(run: Path, output: Path, *, workers: int = 1, scorers: int = 1, **fields: Any) -> TrainRecipe:
    settings = {"num_steps": 6, "sub_batch": 24, "filter_ratio": 0.5, "score_batch": 64, **fields.pop("train", {})}
    return TrainRecipe(
        data=Data(run=str(run), segment_rows=16),
        learner=Weights(model="nano", seed=1),
        train=Train(**settings),
        compute=Workers(device="cpu", workers=workers, scoring_actors=scorers, max_failures=0),
        ledger=Remember(score_log="on"),
        output=str(output),
        checkpoint_every=6,
        **fields,
    )


def log(output: Path) -> pa.Table:
    return pq.read_table(output / "train" / "steps.parquet")


def chosen_addresses(output: Path) -> list[list[int]]:
    return [sorted(step.addresses[step.weights > 0].tolist()) for step in read_steps(str(output))]


@pytest.mark.slow
def test_with_fresh_weights_a_pool_chooses_what_the_worker_would_choose(curated: Path, tmp_path: Path) -> None:
    low = LowResolution(image_size=24, share=0.5)
    for scoring in ("trainer", "pool"):
        summary = train(recipe_for(curated, tmp_path / scoring, train={"scoring": scoring}, low_resolution=low))
        assert summary.failures == [] and summary.ledger["uses"] == 6 * 24
    own, pooled = log(tmp_path / "trainer"), log(tmp_path / "pool")
    assert chosen_addresses(tmp_path / "trainer") == chosen_addresses(tmp_path / "pool")
    np.testing.assert_allclose(pooled["loss"].to_numpy(), own["loss"].to_numpy(), rtol=1e-4)
    for name in ("flops", "effective_clusters", "samples_loaded", "not_decoded"):
        assert pooled[name].to_pylist() == own[name].to_pylist()
    assert pooled["weights_age"].to_pylist() == [0] * 6
    assert all(seconds > 0 for seconds in pooled["pool_seconds_score"].to_pylist())
    assert all(seconds > 0 for seconds in own["decode_seconds"].to_pylist())


@pytest.mark.slow
def test_a_scorer_that_dies_costs_no_sample_and_the_age_stays_what_the_rule_says(curated: Path, tmp_path: Path) -> None:
    settings = {"scoring": "pool", "num_steps": 30, "publish_every": 2, "score_ahead": 3}
    recipe = recipe_for(curated, tmp_path / "run", workers=2, scorers=2, train=settings)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            time.sleep(0.2)
            if not (tmp_path / "run" / "train" / "progress.json").exists():
                continue  # no step has been taken yet
            for pid in scorers():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    summary = train(recipe)
    thread.join(timeout=120)
    assert killed and summary.failures == []
    assert (summary.steps, summary.ledger["uses"]) == (30, 30 * 24)
    ages = log(tmp_path / "run")["weights_age"].to_pylist()
    assert ages == [step - max(step - 3, 0) // 2 * 2 for step in range(30)]
    assert max(ages) < 3 + 2
    loaded = sum(len(step.addresses) for step in read_steps(str(tmp_path / "run")))
    assert loaded == summary.samples_loaded == 30 * 48


def scorers() -> list[int]:
    """Processes of this test's own Ray that are scorers."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid, parents[int(folder.name)] = (
                int(folder.name),
                int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]),
            )
            if "ray::Scorer" in (folder / "cmdline").read_text():
                found.append(pid)
        except OSError:
            continue  # it has ended

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid > 1 and is_ours(parents.get(pid, 0)))

    return [pid for pid in found if is_ours(pid)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_parts_hold_every_row_once_with_its_own_image(world_size: int) -> None:
    """12 rows, 7 of them in full, each with its number as image, caption and weight."""
    number = torch.arange(12)
    chosen = Chosen(
        own=number, handovers=[], weights=number.float(), scores=torch.rand(24),
        selected={"address": number, "uid": number, "text": number},
        is_own_selected=torch.arange(24) < 12, row_weights=torch.ones(24), is_low=torch.zeros(24, dtype=torch.bool),
    )  # fmt: skip
    recorded = torch.arange(100, 123), torch.rand(23)
    sub_batch = SubBatch([number[:7], number, number[7:]], number.float(), number)
    ready = Ready(
        0, Picked(chosen, None, None, recorded, number), sub_batch,
        torch.arange(100, 124), torch.ones(24, dtype=torch.bool), RowFlops(1, 1, 0), Stopwatch(), {},
    )  # fmt: skip
    parts = [part_of(ready, rank, world_size, has_low=True) for rank in range(world_size)]
    for part in parts:
        full, captions, low = part["inputs"]
        assert [*full, *low] == captions.tolist() == part["weights"].tolist()
    assert sorted(np.concatenate([part["weights"] for part in parts])) == list(range(12))
    assert np.concatenate([part["addresses"] for part in parts]).tolist() == list(range(100, 124))
    assert np.concatenate([part["recorded"][0] for part in parts]).tolist() == list(range(100, 123))
    assert parts[0]["selected"].keys() == {"address", "uid"}
    assert all(part["selected"] == {} for part in parts[1:])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"train": {"score_ahead": 2}}, "are for train.scoring pool"),
        ({"train": {"scoring": "pool", "scope": "local"}}, "for scoring that is spread over the workers"),
        ({"train": {"scoring": "pool", "distill": 1.0}, "method": {"name": "grad_mimic"}}, "grad_mimic"),
    ],
)
def test_what_a_pool_cannot_do_is_refused(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        recipe_for(tmp_path / "in", tmp_path / "out", **fields)
