"""GradMatch: a weighted few rows whose gradients sum to that of all rows.

Source: Killamsetty et al. 2021 (arXiv:2103.00123), Algorithm 1 and 2: orthogonal matching pursuit of the mean gradient,
with weights that are not negative and a ridge. Nothing in it knows a label is wrong: a subset that stands for noisy
rows is as noisy. (Grad-Mimic's code calls by this name a fit of each row by itself, which is not it.)

Deviations. The set that is matched is the super-batch, not the epoch; gradients are those of the head's weight, in
closed form, as in the paper's experiments. The ridge is relative to the gram matrix's mean diagonal, for gradients
shrink as training goes on. Rows that the pursuit leaves out fill up the selection with weight 0, in the order of the
uids' hashes; weights are scaled to mean 1.

n rows, C classes, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._pool_order import uid_column_words
from curation.numerics.gradients import head_gram
from curation.numerics.pursuit import matching_pursuit
from curation.numerics.sampling import exact_top, tie_hash
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows, uniform_weights


@dataclass(frozen=True)
class GradMatch:
    """Rows whose weighted gradients match the super-batch's mean gradient."""

    ridge: float = 0.5
    """lambda of the paper, times the mean squared length of a gradient."""

    needs = frozenset({"head_residual", "head_input", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge must be finite and at least 0, got {self.ridge}")

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the agreement with the mean gradient."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Product of a row's gradient with the mean gradient (n,) float32: what the pursuit's first step ranks by."""
        return self._gram(rows).mean(dim=1).float()

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows; those that the pursuit did not take have weight 0."""
        gram_nn = self._gram(rows)
        keep = check_keep(keep, num_rows(rows))
        ridge = self.ridge * gram_nn.diagonal().mean().item() if keep else 0.0
        weights_n = matching_pursuit(gram_nn, gram_nn.mean(dim=1), num_rows=keep, ridge=ridge).float()
        ties = tie_hash(uid_column_words(rows["uid"]))
        indices = torch.from_numpy(exact_top(weights_n.cpu().numpy(), ties, keep)).to(weights_n.device)
        weights = weights_n[indices]
        total = weights.sum()
        return Selection(indices, weights * (keep / total) if total > 0 else uniform_weights(keep).to(weights.device))

    def _gram(self, rows: Rows) -> Tensor:
        check_needs(self, rows)
        return head_gram(rows["head_residual"].double(), rows["head_input"].double()).cpu()
