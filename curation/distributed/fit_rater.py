"""A rater from end to end: check the recipe, gather the rows, teach on Ray Train workers, keep the account.

A run that was killed goes on from its newest checkpoint; a finished one is not done again.
"""

from __future__ import annotations

import json
import os
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage, tables
from curation.data.lease import Lease
from curation.data.rater_files import ABOUT, rater_about
from curation.distributed import versions
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.rater_loop import rater_loop, read_collapse
from curation.distributed.rater_rows import gather_rows
from curation.distributed.resources import cluster
from curation.distributed.stopping import Stop
from curation.distributed.subset_study import checked_run
from curation.distributed.train import REPORT_POLL_S, TrainFailed, cause_of
from curation.recipe.rater import RaterRecipe

MAX_FAILURES = 2
MAY_CHANGE = {"name", "output", "workers", "device", "checkpoint_every"}
"""Fields that may differ from one start to the next: they do not change the rater."""


def fit_rater(recipe: RaterRecipe, *, stop: Stop | None = None) -> dict[str, Any]:
    """Teach what is left; what is told of the rater, with `rows` of each part.

    ValueError or OtherRun if the recipe cannot run, OutputInUse, TrainFailed if the workers could not go on or the
    batch's weight collapsed.
    """
    recipe = checked_rater(recipe)
    with Lease(recipe.output):
        _commit_to(recipe)
        if why := read_collapse(recipe.output):
            raise TrainFailed(why)
        workers = recipe.workers
        with cluster(num_cpus=workers), (stop or Stop()).on_sigterm(interrupts=True):
            rows = gather_rows(recipe)
            if not storage.exists(storage.join(recipe.output, ABOUT)):
                _train(recipe)
        if why := read_collapse(recipe.output):
            raise TrainFailed(why)
        return {**rater_about(recipe.output), "rows": rows}


def checked_rater(recipe: RaterRecipe) -> RaterRecipe:
    """The recipe with URLs that every node may open. ValueError if it cannot run; nothing is touched."""
    if not recipe.output:
        raise ValueError("output: name a folder for the rater, as in --output fits/rater")
    run, splits = checked_run(recipe.run), recipe.splits
    if splits.validation_run:
        splits = splits.model_copy(update={"validation_run": checked_run(splits.validation_run)})
    for of in filter(None, [run, splits.validation_run]):
        for column in filter(None, [recipe.features, recipe.modelled, recipe.condition]):
            tables.vector_width(of, min(manifest.committed(of, EMBED_STAGE)), column)
    return recipe.model_copy(update={"run": run, "splits": splits, "output": storage.absolute(recipe.output)})


def _commit_to(recipe: RaterRecipe) -> None:
    """OtherRun if the folder holds another rater's run."""
    made_by = json.loads(recipe.model_dump_json(exclude=MAY_CHANGE))
    runs = filter(None, [recipe.run, recipe.splits.validation_run])
    made_by["pool"] = [_digest_of(run, recipe) for run in runs]
    url = storage.join(recipe.output, "recipe.json")
    if storage.exists(url):
        manifest.check_same(manifest.read(url)["made_by"], made_by, what="a rater")
        return
    whole = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "made_by": made_by,
        "versions": versions.packages(),
        "code": versions.code(),
    }
    storage.write_bytes(url, json.dumps(whole, indent=1).encode())


def _digest_of(run: str, recipe: RaterRecipe) -> str:
    """What the rows of a run are made by: its tables, and the pieces of the columns that are read."""
    stages = [EMBED_STAGE]
    own = tables.own_column_names(run, min(manifest.committed(run, EMBED_STAGE)))
    for column in filter(None, [recipe.features, recipe.modelled, recipe.condition]):
        if column not in own:
            stages.append(tables.piece_stage(tables.piece_of(column)))
    keys = {stage: {n: r["key"] for n, r in manifest.committed(run, stage).items()} for stage in stages}
    return manifest.digest(keys)


def _train(recipe: RaterRecipe) -> None:
    """Ray Train workers until the rater is written, or has collapsed. TrainFailed if they give up."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", REPORT_POLL_S)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = recipe.device if recipe.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda" and gpus < recipe.workers:
        raise ValueError(f"workers={recipe.workers} need a GPU each, the cluster has {gpus}")
    trainer = ray.train.torch.TorchTrainer(
        rater_loop,
        train_loop_config={"recipe": recipe},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=device == "cuda"),
        run_config=RunConfig(
            # Another name at each start: a run of Ray's that ended is not to be gone on with.
            name=f"rater-{os.getpid()}",
            storage_path=storage.join(recipe.output, "train"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainFailed(cause_of(error)) from error
    if not storage.exists(storage.join(recipe.output, ABOUT)) and not read_collapse(recipe.output):
        raise TrainFailed("the workers ended without a rater")
