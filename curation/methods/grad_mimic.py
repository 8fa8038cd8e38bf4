"""Grad-Mimic: weigh a row by how far a gradient step on it alone would move the learner towards a reference.

Source: Huang et al. 2025 (arXiv:2501.06708) and its code. The mimic score of a row is the projection of its negative
gradient on the way from the learner's weights to the reference's (`numerics.gradients`, a column that training makes);
a softmax over the batch turns scores into weights. Mislabelled rows pull the other way and get next to nothing.

Deviations. Weights are n times the paper's, so that they have mean 1 and the mean of weight times loss is the paper's
sum; its threshold 1 / batch is weight 1. When fewer rows are kept than there are, they are those of the highest score
(ties by the hash of the uid); the paper keeps all.

n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.methods._softmax import check_temperature, softmax_weights
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows


@dataclass(frozen=True)
class GradMimic:
    """All rows, weighted by their mimic score; `mimic_score` is a column that the training run makes."""

    temperature: float = 1.0
    """tau. The authors' default is 1; lower is better with a good reference, and worse with a bad one."""

    needs = frozenset({"mimic_score", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the raw score: weights are relative to their batch."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The mimic score (n,) float32."""
        check_needs(self, rows)
        return rows["mimic_score"].float()

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows, weighted by the softmax of their scores. ValueError if a score is not finite."""
        scores = self.score(rows, progress)
        keep = check_keep(keep, num_rows(rows))
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"mimic_score is not finite in {int((~torch.isfinite(scores)).sum())} rows")
        indices = select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng).indices
        return Selection(indices=indices, weights=softmax_weights(scores[indices], self.temperature))
