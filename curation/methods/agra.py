"""AGRA: train on the rows whose gradient agrees with that of a second, random batch.

Source: Sedova et al. 2023 (arXiv:2306.04502), Algorithm 1. A row counts fully if the cosine of its gradient with the
mean gradient of a comparison batch, drawn from the same noisy data, is positive, and not at all otherwise.

Deviations. Gradients are those of the head's weight, in closed form. Where no row agrees all count alike, as in
Grad-Mimic's code. When fewer rows are kept than there are, they are those of the highest cosine.

n rows, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.numerics.gradients import head_gradient_norms, head_gradient_products
from curation.selector import Rows, Selection, check_needs, uniform_weights


def agreement_weights(cosines_n: Tensor) -> Tensor:
    """n / (rows that agree) for a positive cosine, 0 for the others, (n,) float32; all 1 if none agrees."""
    agrees = cosines_n > 0
    if not bool(agrees.any()):
        return uniform_weights(len(cosines_n)).to(cosines_n.device)
    return agrees.float() * (len(cosines_n) / agrees.sum())


@dataclass(frozen=True)
class Agra:
    """Rows that agree with `comparison_gradient` (C, F), the mean head gradient of the comparison batch."""

    needs = frozenset({"head_residual", "head_input", "comparison_gradient", "uid"})
    fixed_size = True
    unbiased = False

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the cosine."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The cosine (n,) float32; 0 for a row, or a comparison batch, without a gradient."""
        check_needs(self, rows)
        residual_nC, input_nF = rows["head_residual"].float(), rows["head_input"].float()
        comparison_CF = rows["comparison_gradient"].float()
        lengths_n = head_gradient_norms(residual_nC, input_nF) * comparison_CF.norm()
        return head_gradient_products(residual_nC, input_nF, comparison_CF) / lengths_n.clamp_min(
            torch.finfo(torch.float32).tiny
        )

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows; those that disagree have weight 0."""
        chosen = select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
        return chosen._replace(weights=agreement_weights(self.score(rows, progress)[chosen.indices]))
