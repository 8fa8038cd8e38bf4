"""The demo's race: the same small learner trained on everything, and on what JEST selects from the same pool.

Both start from the same weights and take batches of the same size, with the same optimiser; one field of the recipe
differs. They are measured by retrieval on clean pairs of the stream "held_out", which is neither the pool's nor the
reference's. Fixed before the first race was run: 300 steps of 128 rows, filter ratio 0.8, the learning rate that the
reference had been trained with.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.recipe import TrainRecipe
from curation.recipe.parts import Weights
from curation.recipe.train_parts import Data, Evaluate, Train, Workers
from jobs.demo_pool import DemoPool
from jobs.demo_reference import LEARNING_RATE, MODEL, WARMUP
from jobs.demo_scenes import make_pairs

HELD_OUT_PAIRS = 1_000
NUM_STEPS = 300
SUB_BATCH = 128
FILTER_RATIO = 0.8
EVALUATIONS = 12
METRIC = "mean_r1"


def write_held_out(path: Path, *, num_pairs: int = HELD_OUT_PAIRS, seed: int = 0) -> Path:
    """A tar of clean pairs that nobody trains on; a no-op if it is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for index, pair in enumerate(make_pairs(num_pairs, stream="held_out", seed=seed)):
            for extension, data in (("jpg", pair.image), ("txt", pair.caption.encode())):
                header = tarfile.TarInfo(f"{index:09d}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    partial.rename(path)
    return path


def write_mismatched(pool: DemoPool, path: Path) -> Path:
    """Which samples show a scene with another sample's caption: what the race watches. A no-op if it is there."""
    if not path.exists():
        truth = pq.read_table(pool.truth)
        matches = truth["caption_matches"].to_numpy(zero_copy_only=False)
        mismatched = (np.array(truth["kind"].to_pylist()) == "scene") & ~matches
        partial = path.with_suffix(".partial")
        pq.write_table(pa.table({"uid": truth["uid"], "mismatched": mismatched}), partial)
        partial.rename(path)
    return path


def race_recipe(
    *,
    run: Path,
    output: Path,
    held_out: Path,
    mismatched: Path,
    method: str,
    num_steps: int = NUM_STEPS,
    sub_batch: int = SUB_BATCH,
    seed: int = 0,
) -> TrainRecipe:
    """One runner: `uniform` loads what it trains on; every other method selects from super-batches."""
    return TrainRecipe(
        name=f"race-{method}",
        data=Data(run=str(run), truth=str(mismatched), truth_column="mismatched"),
        learner=Weights(model=MODEL, seed=1_000 + seed),
        method={"name": method},
        train=Train(
            num_steps=num_steps,
            sub_batch=sub_batch,
            filter_ratio=0.0 if method == "uniform" else FILTER_RATIO,
            score_batch=128,
            learning_rate=LEARNING_RATE,
            warmup=WARMUP,
        ),
        evaluate=Evaluate(
            shards=str(held_out), every_steps=max(1, num_steps // EVALUATIONS), max_samples=HELD_OUT_PAIRS
        ),
        compute=Workers(device="cpu"),
        output=str(output),
        checkpoint_every=num_steps,
        seed=seed,
    )
