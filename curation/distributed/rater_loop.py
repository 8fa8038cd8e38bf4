"""What one Ray Train worker does to teach a rater: step after step, the same weights on every rank.

Rank 0 writes. OUTPUT/state.pt is the newest checkpoint, snapshots/ the proxy at each epoch's end, and `rater.pt` with
its json the end; a batch weight that collapses ends the run with OUTPUT/collapsed.json, for to begin again would not
help.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from curation.data import manifest, storage
from curation.data.rater_files import save_rater
from curation.distributed.rater_rows import load_split
from curation.numerics.percentiles import percentiles, sorted_sample
from curation.recipe.rater import RaterRecipe
from curation.training.collectives import ranks
from curation.training.rater import Collapsed, StepFacts
from curation.training.rater_dynamics import dynamics
from curation.training.rater_run import RaterRun, ratings_of

DYNAMICS_ROWS = 2_000
RANGES = 10


def rater_loop(config: dict[str, Any]) -> None:
    """Teach what is left of a rater, and write it."""
    recipe: RaterRecipe = config["recipe"]
    device = str(ray.train.torch.get_device())
    if device == "cpu":
        torch.set_num_threads(1)
    teach(recipe, device=device)


def teach(recipe: RaterRecipe, *, device: str) -> None:
    """One rank's part, from the newest checkpoint to the end. Needs no Ray itself."""
    splits = {part: load_split(recipe, part) for part in ("train", "validation", "test")}
    run = RaterRun(
        recipe.teach.spec(), recipe.rater.shape(), recipe.proxy.spec(), **splits, seed=recipe.seed, device=device
    )
    log: list[dict[str, float]] = []
    of_epoch: list[list[float]] = []
    state_url = storage.join(recipe.output, "state.pt")
    if storage.exists(state_url):
        state = torch.load(io.BytesIO(storage.read_bytes(state_url)), weights_only=True, map_location=device)
        run.trainer.load_state_dict(state["trainer"])
        log, of_epoch = json.loads(state["log"])
    is_first = ranks().rank == 0
    while not run.is_over:
        try:
            facts = run.step()
        except Collapsed as error:
            if is_first:
                told = {"format_version": 1, "step": run.trainer.step, "why": str(error), "epochs": log}
                storage.write_bytes(storage.join(recipe.output, "collapsed.json"), json.dumps(told, indent=1).encode())
            return
        if facts is None:
            continue
        of_epoch.append(list(facts))
        if not is_first:
            continue
        if run.ends_epoch:
            epoch = run.trainer.step // run.plan.steps_per_epoch
            means = dict(zip(StepFacts._fields, np.mean(of_epoch, axis=0).tolist(), strict=True))
            held = {f"{name}_loss_at_end": loss for name, loss in run.evaluated().items()}
            log.append({"epoch": epoch, "step": run.trainer.step, **means, **held})
            of_epoch = []
            _save(storage.join(recipe.output, "snapshots", f"{epoch:04d}.pt"), run.trainer.proxy.state_dict())
        if run.ends_epoch or run.trainer.step % recipe.checkpoint_every == 0:
            _save(state_url, {"trainer": run.trainer.state_dict(), "log": json.dumps([log, of_epoch])})
    if is_first:
        _finish(recipe, run, log)


def _finish(recipe: RaterRecipe, run: RaterRun, log: list[dict[str, float]]) -> None:
    rater = run.finished_rater()
    train = load_split(recipe, "train")
    places = np.arange(min(len(train.seen), DYNAMICS_ROWS))
    rating = ratings_of(rater, np.asarray(train.seen[places]))
    snapshots = [
        torch.load(io.BytesIO(storage.read_bytes(url)), weights_only=True, map_location=rater.mean_F.device)
        for url in (storage.join(recipe.output, "snapshots", name) for name in _snapshots(recipe.output))
    ]
    percentile = percentiles(rating, sorted_sample(rating))
    told: dict[str, Any] = {"format_version": 1, "rows": len(places), "ranges": RANGES, "epochs": log}
    if len(np.unique((percentile * RANGES).astype(int).clip(0, RANGES - 1))) == RANGES:
        found = dynamics(run.trainer.proxy, snapshots, run.rows("train", places), percentile, ranges=RANGES)
        told |= {name: np.round(value, 6).tolist() for name, value in found._asdict().items()}
    text = json.dumps(told, indent=1).replace("NaN", "null")
    storage.write_bytes(storage.join(recipe.output, "fit", "dynamics.json"), text.encode())
    about = {
        "features": recipe.features,
        "mode": rater.mode,
        "taught_in": recipe.teach.mode,
        "num_features": len(rater.mean_F),
        "others": rater.others,
        "shape": recipe.rater.model_dump(),
        "steps": run.trainer.step,
        "last_epoch": log[-1] if log else {},
        "deviation_of_ratings": float(rating.std()),
    }
    save_rater(recipe.output, {name: value.cpu() for name, value in rater.state_dict().items()}, about)


def _snapshots(output: str) -> list[str]:
    return sorted(name for name in storage.names_in(storage.join(output, "snapshots")) if name.endswith(".pt"))


def _save(url: str, state: Any) -> None:
    with storage.write_atomic(url) as file:
        torch.save(state, file)


def read_collapse(output: str) -> str | None:
    """Why a run ended without a rater, if it did."""
    url = storage.join(output, "collapsed.json")
    return manifest.read(url)["why"] if storage.exists(url) else None
