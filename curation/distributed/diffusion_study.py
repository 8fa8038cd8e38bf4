"""One generative model per selection and seed, trained side by side, and what their samples are worth.

Of each model's samples: Fréchet distance, precision, recall, density and coverage against the pool at equal numbers,
memorisation of the rows that it was trained on, and, as the control, the distance of those rows themselves. The ranking
is repeated without memorised samples, at one number for all models.

OUTPUT/study.json says what the study is; another recipe in the same folder is refused, but arms, seeds and workers may
be added. `images.npy` and `features.npy` are the pool's, units/ARM-SEED/ a model's (`diffusion_loop`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from torch import Tensor

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.data.lease import Lease
from curation.data.pool_rows import read_pixels, read_pool
from curation.distributed.arms import Told, choose, columns_of, overlap, with_straw_men
from curation.distributed.diffusion_loop import Unit, diffusion_loop, is_done, load_array, save_array, unit_url
from curation.distributed.notices import note_url, passed_on
from curation.distributed.resources import cluster
from curation.distributed.shared_networks import shared_networks
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run
from curation.distributed.train import REPORT_POLL_S, TrainFailed, cause_of
from curation.evaluation.compare import MAX_WIDTH, Reference
from curation.evaluation.memorisation import MEMORISED_BELOW, memorisation, nearest_train_ratio
from curation.models.frozen import frozen_digest
from curation.recipe.evaluate import DiffusionRecipe
from curation.recipe.parts import Pool

SHOWN = 25
"""Samples of each model on the page."""
MAX_FAILURES = 2
NOT_THE_STUDY = {
    "arms",
    "straw_men",
    "seeds",
    "workers",
    "device",
    "name",
    "output",
    "run",
    "checkpoint_every",
    "infinity",
    "sample_batch",
}
"""Fields that may change from one start to the next: they add models, or do not change them."""


@dataclass(frozen=True)
class DiffusionStudy:
    """Figures by arm, each a list over seeds; the fixed-seed samples are the first of each unit's."""

    features: str
    samples: int
    arms: dict[str, dict[str, list[float]]]
    overlap: dict[str, dict[str, int]]
    units: list[dict[str, Any]]
    warnings: list[str]
    notes: list[str]
    format_version: int = FORMAT_VERSION


def study_diffusion(
    recipe: DiffusionRecipe, *, told: Told = lambda overlap, warnings: None, stop: Stop | None = None
) -> DiffusionStudy:
    """Run what is not done yet and measure all; what the selections share with the evaluation is `told` first.

    ValueError or OtherRun if it cannot run, TrainFailed if it fails, Interrupted if it is asked to stop while models
    are left: those in training save their states first.
    """
    stop = stop or Stop()
    if not recipe.output:
        raise ValueError("output: name a folder, as in --output studies/first")
    recipe = recipe.model_copy(update={"run": checked_run(recipe.run), "output": storage.absolute(recipe.output)})
    recipe, notes = with_straw_men(recipe)
    with Lease(recipe.output):
        _commit_to(recipe)
        arms = recipe.all_arms()
        pool = read_pool(recipe.run, columns_of(arms, selected_on=recipe.selected_on))
        _write_images(recipe)
        units = [
            Unit(arm.name, seed, arm.steps or recipe.steps)
            for seed in range(recipe.seed, recipe.seed + recipe.seeds)
            for arm in arms
        ]
        held = {unit.arm: overlap(pool, _rows_of(recipe, unit, pool), pool) for unit in units}
        network = recipe.network
        measured_by = frozenset({frozen_digest(network.library, network.model, **network.source())})
        warnings = shared_networks(recipe.run, arms, selected_on=recipe.selected_on, measured_by=measured_by)
        told(held, warnings)
        # The longest first, so that no worker is left with a long one at the end.
        todo = sorted((unit for unit in units if not is_done(recipe.output, unit)), key=lambda unit: -unit.steps)
        if todo or not storage.exists(storage.join(recipe.output, "features.npy")):
            stop.check()
            _train(recipe, todo, stop)
        study = _measured(recipe, units, held, warnings=warnings, notes=notes)
        storage.write_bytes(
            storage.join(recipe.output, "diffusion.json"), json.dumps(dataclasses.asdict(study), indent=1).encode()
        )
    return study


def samples_of(recipe: DiffusionRecipe, arms: Iterable[str], *, shown: int = SHOWN) -> dict[str, np.ndarray]:
    """The first samples (n, S, S, 3) uint8 of each arm's model at the first seed: the same noise for all arms."""
    output = storage.absolute(recipe.output)
    return {name: load_array(unit_url(output, Unit(name, recipe.seed, 0), "samples.npy"))[:shown] for name in arms}


def real_images(recipe: DiffusionRecipe, *, shown: int = SHOWN) -> np.ndarray:
    """The pool's first images (n, S, S, 3) uint8 as the models were shown them."""
    return load_array(storage.join(storage.absolute(recipe.output), "images.npy"))[:shown]


def _commit_to(recipe: DiffusionRecipe) -> None:
    """OtherRun if the folder holds another study."""
    url = storage.join(recipe.output, "study.json")
    network = recipe.network
    made_by = {
        **json.loads(recipe.model_dump_json(exclude=NOT_THE_STUDY)),
        "network": frozen_digest(network.library, network.model, **network.source()),
        "pool": manifest.digest(
            {number: record["key"] for number, record in manifest.committed(recipe.run, "embed").items()}
        ),
    }
    arms = {arm.name: {"source": arm.source, "steps": arm.steps or recipe.steps} for arm in recipe.all_arms()}
    known: dict[str, Any] = {}
    if storage.exists(url):
        held = manifest.read(url)
        known = held["arms"]
        manifest.check_same(held["made_by"], made_by, what="a study")
        for name in arms.keys() & known.keys():
            manifest.check_same(known[name], arms[name], what=f"the arm {name}")
    whole = {"format_version": FORMAT_VERSION, "made_by": made_by, "arms": known | arms}
    storage.write_bytes(url, json.dumps(whole, indent=1).encode())


def _write_images(recipe: DiffusionRecipe) -> None:
    url = storage.join(recipe.output, "images.npy")
    if not storage.exists(url):
        pool = Pool.model_validate(manifest.read(storage.join(recipe.run, "recipe.json"))["recipe"]["pool"])
        side = recipe.generator.image_size
        save_array(url, read_pixels(recipe.run, side=side, rules=pool.read_rules(), max_pixels=pool.max_pixels))


def _rows_of(recipe: DiffusionRecipe, unit: Unit, pool: pa.Table) -> np.ndarray:
    """Places (k,) in the pool of the unit's selection, which is made once."""
    url = unit_url(recipe.output, unit, "rows.npy")
    if not storage.exists(url):
        arm = next(arm for arm in recipe.all_arms() if arm.name == unit.arm)
        save_array(
            url,
            choose(arm, pool, keep=recipe.keep, selected_on=recipe.selected_on, seed=unit.seed, cut_full=False),
        )
    return load_array(url)


def _train(recipe: DiffusionRecipe, units: list[Unit], stop: Stop) -> None:
    """Ray Train workers, side by side, until every unit is committed. TrainFailed if they give up, Interrupted if they
    are asked to end before."""
    storage.delete(note_url(recipe.output))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", REPORT_POLL_S)
    workers = max(1, min(recipe.workers, len(units)))
    with cluster(num_cpus=workers), stop.on_sigterm(interrupts=False):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        device = recipe.device if recipe.device != "auto" else ("cuda" if gpus else "cpu")
        if device == "cuda" and gpus < workers:
            raise ValueError(f"workers={workers} need a GPU each, the cluster has {gpus}")
        trainer = ray.train.torch.TorchTrainer(
            diffusion_loop,
            train_loop_config={"recipe": recipe, "units": units},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=device == "cuda"),
            run_config=RunConfig(
                # Another name at each start: a run of Ray's that ended is not to be gone on with.
                name=units[0].name if units else "pool",
                storage_path=storage.join(recipe.output, "train"),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            with passed_on(stop, recipe.output):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainFailed(cause_of(error)) from error
    if left := [unit.name for unit in units if not is_done(recipe.output, unit)]:
        stop.check()
        raise TrainFailed(f"{len(left)} models were not finished, {left[0]} for one")


def _measured(
    recipe: DiffusionRecipe,
    units: list[Unit],
    held: dict[str, dict[str, int]],
    *,
    warnings: list[str],
    notes: list[str],
) -> DiffusionStudy:
    """All figures, from what the units left."""
    features = torch.from_numpy(load_array(storage.join(recipe.output, "features.npy")))
    reference = Reference(features, max_width=recipe.max_width)
    # Selections are often smaller than the features are wide: their own rows are compared in fewer directions.
    control = reference if recipe.max_width <= MAX_WIDTH else Reference(features, max_width=MAX_WIDTH)
    samples = {unit: torch.from_numpy(load_array(unit_url(recipe.output, unit, "features.npy"))) for unit in units}
    trained_on = {unit: features[load_array(unit_url(recipe.output, unit, "rows.npy"))] for unit in units}
    fresh = {
        unit: samples[unit][nearest_train_ratio(samples[unit], trained_on[unit]) >= MEMORISED_BELOW] for unit in units
    }
    num_fresh = min(len(rows) for rows in fresh.values())
    figures: dict[str, dict[str, list[float]]] = {}
    told: list[dict[str, Any]] = []
    for unit in units:
        figure = _of_one(unit, samples[unit], trained_on[unit], reference, control=control, keep=recipe.keep)
        if recipe.infinity:
            figure["distance_infinity"] = reference.distance_infinity(samples[unit], seed=unit.seed)
        if num_fresh >= 2:
            figure["distance_unmemorised"] = reference.distance(fresh[unit][:num_fresh])
        told.append({**dataclasses.asdict(unit), "unmemorised_samples": len(fresh[unit]), **figure})
        for name, value in figure.items():
            figures.setdefault(unit.arm, {}).setdefault(name, []).append(value)
    network = recipe.network
    named = f"{network.library} {network.model}, {features.shape[1]} numbers"
    return DiffusionStudy(named, recipe.samples, figures, held, told, warnings, notes)


def _of_one(
    unit: Unit, samples: Tensor, trained_on: Tensor, reference: Reference, *, control: Reference, keep: int
) -> dict[str, float]:
    """One model's figures; the distance of its own training rows only where they are as many as in other arms."""
    num_compared = min(len(samples), reference.rows)
    compared = reference.compare({unit.name: samples[:num_compared]}, seed=unit.seed)[unit.name]
    figure = {name: value for name, value in compared._asdict().items() if name != "rows"}
    figure |= memorisation(samples, trained_on)._asdict()
    if len(trained_on) == keep:
        figure["distance_of_training_rows"] = control.distance(trained_on)
    return figure
