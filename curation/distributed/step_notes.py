"""What rank 0 notes of each step, whoever trains: how much was loaded, trained and computed, and what it was."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import torch

from curation.data import storage
from curation.data.step_log import Row
from curation.distributed.ready_batches import Ready
from curation.numerics.sampling import uid_words
from curation.recipe import TrainRecipe
from curation.selector import Rows
from curation.training.flops import TRAINING_PASS
from curation.training.learner import LEARNER_COLUMNS
from curation.training.step_facts import KnownJunk, facts_of, fit_clusters

TOTALS = ("samples_loaded", "samples_trained", "flops", "seconds")


class StepNotes:
    """The running totals of a run, and the facts of its steps."""

    def __init__(self, recipe: TrainRecipe, totals: dict[str, float]):
        """`totals` are those of the steps that were done before."""
        self._recipe = recipe
        self.totals: dict[str, float] = {**dict.fromkeys(TOTALS, 0.0), **totals}
        self._scores_learner = bool(recipe.step_selector().needs & LEARNER_COLUMNS)
        self._junk = _load_junk(recipe)
        self._centroids: torch.Tensor | None = None

    def of(self, ready: Ready) -> Row:
        """Add a step to the totals, but for its seconds; its row of the log. Figures are of all ranks."""
        selected = ready.picked.chosen.selected
        self.totals["samples_loaded"] += self._recipe.train.super_batch
        self.totals["samples_trained"] += len(selected["address"])
        self.totals["flops"] += self._step_flops(ready)
        addresses = selected["address"]
        return {
            "step": ready.number + 1,
            **facts_of(selected, centroids_KD=self._clusters(selected), junk=self._junk),
            "repeated_samples": len(addresses) - len(addresses.unique()),
            **{name: self.totals[name] for name in TOTALS if name != "seconds"},
            **ready.noted,
            **{f"seconds_{name}": value for name, value in ready.watch.seconds.items()},
        }

    def _clusters(self, selected: Rows) -> torch.Tensor | None:
        """The clusters in which the run counts diversity: fitted once, on the first super-batch's chosen rows."""
        if self._centroids is None and "reference_image_embedding" in selected:
            url = storage.join(self._recipe.output, "train", "clusters.npy")
            if not storage.exists(url):
                fitted = fit_clusters(selected["reference_image_embedding"].cpu(), seed=self._recipe.seed)
                with storage.write_atomic(url) as file:
                    np.save(file, fitted.numpy())
            with storage.open_read(url) as file:
                self._centroids = torch.from_numpy(np.load(file, allow_pickle=False))
        return self._centroids

    def _step_flops(self, ready: Ready) -> float:
        """Floating-point operations of a step over all ranks: scoring, an online reference, and training."""
        train, per_row = self._recipe.train, ready.row_flops
        reused_forward = ready.picked.kept is not None
        scoring = per_row.scoring if self._scores_learner and not reused_forward else 0.0
        again = 1.0 if train.micro_batches > 1 else 0.0
        training = train.sub_batch * per_row.training * (TRAINING_PASS + again)
        return train.super_batch * (scoring + per_row.reference) + training


def _load_junk(recipe: TrainRecipe) -> KnownJunk | None:
    if recipe.data.truth is None:
        return None
    with storage.open_read(recipe.data.truth) as file:
        truth = pq.read_table(file, columns=["uid", recipe.data.truth_column])
    is_junk = truth[recipe.data.truth_column].to_numpy(zero_copy_only=False).astype(bool)
    return KnownJunk(uid_words(truth["uid"].to_pylist()), is_junk)
