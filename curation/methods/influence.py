"""Influence by a held-out gradient: weigh a row by how much a step on it lowers the loss of clean, held-out rows.

Source: Koh and Liang 2017 (arXiv:1703.04730), Eq. 2, with the identity in place of the inverse Hessian, which is the
first-order change of the held-out loss: score = <g_i, g_held-out>. The control of Grad-Mimic that knows clean labels
but no reference weights.

Deviations. Gradients are those of the head's weight, in closed form; the held-out gradient is divided by its length, as
Grad-Mimic's task vector is; weights are the softmax that Grad-Mimic's authors give all their rivals.

n rows, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.methods._softmax import check_temperature, softmax_weights
from curation.numerics.gradients import head_gradient_products
from curation.selector import Rows, Selection, check_needs


@dataclass(frozen=True)
class Influence:
    """All rows, weighted; `comparison_gradient` (C, F) is the mean head gradient of held-out rows."""

    temperature: float = 1.0
    """Of the softmax."""

    needs = frozenset({"head_residual", "head_input", "comparison_gradient", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Product of the row's gradient with the held-out gradient's direction (n,) float32; 0 where that is 0."""
        check_needs(self, rows)
        held_out_CF = rows["comparison_gradient"].float()
        direction_CF = held_out_CF / held_out_CF.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return head_gradient_products(rows["head_residual"].float(), rows["head_input"].float(), direction_CF)

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows, weighted by the softmax of their scores."""
        chosen = select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
        scores = self.score(rows, progress)[chosen.indices]
        return chosen._replace(weights=softmax_weights(scores, self.temperature))
