"""What each arm costs by the clock, beside its sample-gradients: each alone, one after the other on one thread.

Speed is full data's cost over the arm's: in sample-gradients, by the clock, in CPU seconds, which other work on the
machine does not touch, and in CPU seconds with what was done beforehand, the autoencoder's factors. The features are
told apart: here every arm trains on them, so they are nobody's extra, but of a method that needs them for the sake of
choosing they are. The paper names 2.51x for itself and 1.7x for RCAP at keep 0.7, where as many rounds of 70% can save
no more than 1.43x of the gradients.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from curation.models.frozen import load_frozen
from jobs.benchmarks.dynamic_runs import BATCH, Arm, Pool, train_stack
from jobs.benchmarks.race import interval
from jobs.benchmarks.tracks import TFLITE, real_data


def clock(pool: Pool, arms: Sequence[Arm], *, keep: float, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds of full data and of each arm, by itself; the order turns with the seed."""
    num_rows = len(pool.labels_N)
    steps = {arm.name: rounds * max(1, round(keep * num_rows / BATCH)) for arm in arms}
    steps["full"] = rounds * (num_rows // BATCH)
    every = [Arm("full"), *arms]
    told = {}
    for arm in every[seed % len(every) :] + every[: seed % len(every)]:
        begun, on_cpu = time.perf_counter(), time.process_time()
        [outcome] = train_stack(pool, [arm], num_steps=steps[arm.name], seed=seed)
        told[arm.name] = {
            "sample_gradients": steps[arm.name] * BATCH,
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - on_cpu,
            "choose_seconds": outcome.choose_seconds,
        }
    return told


def feature_seconds(*, images: int) -> float:
    """CPU seconds for the MobileNet features of one image, decoding included."""
    table = pq.read_table(real_data() / "cifar" / "cifar10-test-jpeg.parquet", columns=["image"]).slice(0, images)
    frozen = load_frozen("tflite", str(real_data() / TFLITE))
    begun = time.process_time()
    for image in table["image"].to_pylist():
        frozen.embed(frozen.resize(Image.open(io.BytesIO(image)))[None])
    return (time.process_time() - begun) / images


def speeds(clocks: Sequence[dict[str, Any]], *, num_rows: int) -> dict[str, Any]:
    """Each arm's speed against full data in the same seed, by keep fraction. A clock is of one seed, as `clock` and
    `feature_seconds` tell it: {"by_keep": {keep: arms}, "factor_seconds", "feature_seconds"}."""
    by_keep = {}
    for keep in clocks[0]["by_keep"]:
        told = [clock["by_keep"][keep] for clock in clocks]
        by_keep[keep] = {arm: _speed(arm, told, [clock["factor_seconds"] for clock in clocks]) for arm in told[0]}
    return {
        "by_keep": by_keep,
        "feature_seconds_of_the_pool": interval([clock["feature_seconds"] * num_rows for clock in clocks]),
        "factor_seconds": interval([clock["factor_seconds"] for clock in clocks]),
    }


def _speed(arm: str, told: Sequence[dict[str, Any]], factor_seconds: Sequence[float]) -> dict[str, Any]:
    pairs = [(of["full"], of[arm]) for of in told]
    beforehand = factor_seconds if arm.startswith("dynamic") else [0.0] * len(told)
    return {
        "in_sample_gradients": pairs[0][0]["sample_gradients"] / pairs[0][1]["sample_gradients"],
        "by_the_clock": interval([full["seconds"] / own["seconds"] for full, own in pairs]),
        "in_cpu_seconds": interval([full["cpu_seconds"] / own["cpu_seconds"] for full, own in pairs]),
        "with_factors": interval(
            [
                full["cpu_seconds"] / (own["cpu_seconds"] + before)
                for (full, own), before in zip(pairs, beforehand, strict=True)
            ]
        ),
        "seconds": interval([own["seconds"] for _, own in pairs]),
        "choose_seconds": interval([own["choose_seconds"] for _, own in pairs]),
    }
