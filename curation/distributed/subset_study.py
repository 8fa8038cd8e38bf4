"""Selections judged by their own rows: how the kept images compare with the pool, without a model being trained.

The decisive control of a study of generative models: where the subsets' own images rank as the models do, training
models adds nothing to the claim. What is drawn is drawn anew for each seed; figures are means and deviations over them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage, tables
from curation.data.pool_rows import read_pool
from curation.distributed import versions
from curation.distributed.arms import Told, choose, columns_of, overlap, with_straw_men
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.shared_networks import networks_of, shared_networks
from curation.distributed.stopping import Stop
from curation.evaluation.compare import Reference, check_one_size
from curation.recipe.evaluate import SubsetRecipe


@dataclass(frozen=True)
class SubsetStudy:
    """Figures by arm, each a list over seeds; `overlap` by arm says what of the pool the selection itself is."""

    features: str
    rows: int
    arms: dict[str, dict[str, list[float]]]
    overlap: dict[str, dict[str, int]]
    warnings: list[str]
    notes: list[str]
    format_version: int = FORMAT_VERSION


def judge_subsets(
    recipe: SubsetRecipe, *, told: Told = lambda overlap, warnings: None, stop: Stop | None = None
) -> SubsetStudy:
    """Run a study and keep it in OUTPUT/subset.json; what the selections share with the pool is `told` first.

    What is known of an arm at a seed is committed. ValueError if the study cannot run as it is, Interrupted if it is
    asked to stop: after the next of these.
    """
    stop = stop or Stop()
    run = checked_run(recipe.run)
    if not recipe.output:
        raise ValueError("output: name a folder, as in --output studies/first")
    recipe, notes = with_straw_men(recipe.model_copy(update={"run": run, "output": storage.absolute(recipe.output)}))
    arms = recipe.all_arms()
    pool = read_pool(run, [*{*columns_of(arms, selected_on=recipe.selected_on), recipe.features}])
    features = torch.from_numpy(tables.as_array(pool[recipe.features], name=recipe.features).astype(np.float32))
    reference = Reference(features, max_width=recipe.max_width)
    figures: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}
    measured_by = networks_of(run, recipe.features)
    warnings = shared_networks(run, arms, selected_on=recipe.selected_on, measured_by=measured_by)
    held: dict[str, dict[str, int]] = {}
    measured = _Measured(recipe, features, reference)
    last_seed = recipe.seed + recipe.seeds - 1
    for seed in range(recipe.seed, last_seed + 1):
        rows = {
            arm.name: choose(arm, pool, keep=recipe.keep, selected_on=recipe.selected_on, seed=seed, cut_full=True)
            for arm in arms
        }
        if not held:
            held = {name: overlap(pool, chosen, pool) for name, chosen in rows.items()}
            told(held, warnings)
        check_one_size({name: len(chosen) for name, chosen in rows.items()})
        for name, chosen in rows.items():
            figure, is_new = measured.figure(chosen, seed=seed)
            for measure, value in figure.items():
                figures[name].setdefault(measure, []).append(value)
            if is_new and (seed, name) != (last_seed, arms[-1].name):
                stop.check()
    study = SubsetStudy(recipe.features, recipe.keep, figures, held, warnings, notes)
    storage.write_bytes(
        storage.join(recipe.output, "subset.json"),
        json.dumps(dataclasses.asdict(study), indent=1).encode(),
    )
    return study


class _Measured:
    """Figures of rows, measured once: OUTPUT/measured has a file for all that can change them, named by its digest."""

    def __init__(self, recipe: SubsetRecipe, features_ND: Tensor, reference: Reference):
        self._recipe, self._features_ND, self._reference = recipe, features_ND, reference
        self._made_by = {
            "features": _digest(features_ND.numpy()),
            "code": versions.code(),
            **recipe.model_dump(include={"max_width", "infinity"}),
        }

    def figure(self, rows_k: np.ndarray, *, seed: int) -> tuple[dict[str, float], bool]:
        """Measure -> value, and whether it was measured now."""
        made_by = {**self._made_by, "rows": _digest(rows_k), "seed": seed}
        url = storage.join(self._recipe.output, "measured", f"{manifest.digest(made_by)}.json")
        if storage.exists(url):
            return manifest.read(url)["figures"], False
        arm_kD = self._features_ND[rows_k]
        figures = self._reference.compare_one(arm_kD, seed=seed)._asdict()
        del figures["rows"]
        if self._recipe.infinity:
            figures["distance_infinity"] = self._reference.distance_infinity(arm_kD, seed=seed)
        whole = {"format_version": FORMAT_VERSION, "made_by": made_by, "figures": figures}
        storage.write_bytes(url, json.dumps(whole, indent=1).encode())
        return figures, True


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def checked_run(run: str) -> str:
    """The pool's URL, as every node may open it. ValueError if it is no run with an embedded shard."""
    url = storage.absolute(run) if run else ""
    if not url or not storage.exists(storage.join(url, "recipe.json")) or not manifest.committed(url, EMBED_STAGE):
        raise ValueError(f"run: {run!r} is no run of jobs.curate that embedded anything; name one, as in --run runs/a")
    return url


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean over seeds, and the standard deviation if there is more than one."""
    mean = statistics.fmean(values)
    return f"{mean:.4g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def table_of(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[list[str]]:
    """Lines of a table, the head first: an arm in each, its figures as mean and deviation."""
    names = list(dict.fromkeys(name for told in figures.values() for name in told))
    lines = [["arm", *names]]
    for arm, told in figures.items():
        lines.append([arm, *(mean_and_deviation(told[name]) if told.get(name) else "" for name in names)])
    return lines
