"""RHO-LOSS: keep the rows whose loss the learner can still reduce, one row at a time.

Source: Mindermann et al. 2022 (arXiv:2206.07137), Eq. 3. A row scores its loss under the learner minus its irreducible
loss, that of a reference trained on held-out data: high for what is learnable and not yet learnt, low for noise and
for what is known. It is the pointwise control of JEST: for a loss that does not couple rows, JEST becomes this.

Deviations. Ties are parted by the hash of the uid. `sampling` draws without replacement with p ~ exp(score) instead of
taking the top rows (independent learnability); its noise is a hash of the uid, so a pool of any size can be drawn from.
`temperature` weighs the kept rows by the softmax of their scores, which is what Grad-Mimic's authors call Rho
(arXiv:2501.06708, their code). The learner's losses are a column: whether BatchNorm ran in train mode, as in the
authors' code, is its maker's choice.

N rows; 2 words of a uid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key, uid_column_words
from curation.methods._softmax import check_temperature, softmax_weights
from curation.numerics.sampling import hash_uniform
from curation.selector import Rows, Selection, check_needs


def reducible_loss(learner_loss: Tensor, reference_loss: Tensor) -> Tensor:
    """Learner loss minus irreducible loss, (n,) float32. Eq. 3."""
    return learner_loss.float() - reference_loss.float()


@dataclass(frozen=True)
class Rho:
    """The rows with the highest reducible loss; the columns `learner_loss` and `reference_loss` are made upstream."""

    sampling: bool = False
    """Draw the rows with p ~ exp(score) instead of taking the top ones."""

    temperature: float | None = None
    """Weigh the kept rows by the softmax of their scores at this temperature; None: all alike."""

    needs = frozenset({"learner_loss", "reference_loss", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_temperature(self.temperature)

    @property
    def records(self) -> Literal["loss"]:
        """The ledger keeps the learner's loss."""
        return "loss"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The reducible loss (n,) float32."""
        check_needs(self, rows)
        return reducible_loss(rows["learner_loss"], rows["reference_loss"])

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score; when sampling, with Gumbel noise from hash(uid, seed), whose top rows are such a draw."""
        score = self.score(rows, progress)
        if not self.sampling:
            return score
        # The hash gives multiples of 2**-53, and 0 has no logarithm.
        uniform = hash_uniform(uid_column_words(rows["uid"]), seed).clip(2.0**-54)
        gumbel = torch.from_numpy(-np.log(-np.log(uniform)))
        return (score.double() + gumbel.to(score.device)).float()

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows without replacement, weight 1 each unless there is a temperature."""
        chosen = select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
        if self.temperature is None:
            return chosen
        scores = self.score(rows, progress)[chosen.indices]
        return chosen._replace(weights=softmax_weights(scores, self.temperature))
