"""The second batch that a method compares a step's rows with, and its mean head gradient at the learner's weights.

Its rows are drawn once and stay in memory; each step draws a batch of them, by its own number, so a run that begins
again compares with what it would have compared with. Every rank computes the same gradient: a batch costs less than
telling of it.
"""

from __future__ import annotations

import numpy as np
import torch

from curation.data import manifest, offered
from curation.data.drawn_rows import draw_rows
from curation.distributed.embed import STAGE as EMBED_STAGE
from curation.distributed.learners import LearnerSpec
from curation.selector import Rows
from curation.training.classifier_learner import ClassifierLearner
from curation.training.learner import Learner


class Comparison:
    """Gives each step's `comparison_gradient`."""

    def __init__(self, spec: LearnerSpec, learner: Learner):
        """Reads the rows. ValueError if one bears a label that is not learnt."""
        recipe, run = spec.recipe, spec.recipe.comparison.run
        assert isinstance(learner, ClassifierLearner) and recipe.data.features and recipe.data.label
        shards = offered.offered_shards(run, manifest.committed(run, EMBED_STAGE))
        rows = draw_rows(
            run,
            shards,
            num_rows=recipe.comparison.rows,
            features=recipe.data.features,
            label=recipe.data.label,
            classes={name: number for number, name in enumerate(spec.classes)},
            seed=recipe.seed,
        )
        self._learner, self._seed = learner, recipe.seed
        self._features, self._labels = torch.from_numpy(rows.features_NF), torch.from_numpy(rows.labels_N)
        self._batch = min(recipe.comparison.batch or recipe.train.sub_batch, len(self._labels))

    def __call__(self, step: int) -> Rows:
        """The gradient of the batch of `step`, as a run value."""
        drawn = np.random.default_rng([self._seed, step]).choice(len(self._labels), self._batch, replace=False)
        return {"comparison_gradient": self._learner.mean_head_gradient(self._features[drawn], self._labels[drawn])}


def comparison_of(spec: LearnerSpec, learner: Learner) -> Comparison | None:
    """None if the recipe's method compares with no other batch."""
    return Comparison(spec, learner) if spec.recipe.compares else None
