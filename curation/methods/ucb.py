"""UCB dynamic pruning: the rows whose loss is high, or might be.

Source: Raju et al. 2021 (arXiv:2111.12621), whose constants are not public to us; this is our completion. A row scores
the running mean of its loss plus `confidence` times its running deviation, and the deviation of a row that was seldom
used counts for more: it is multiplied by 1 + 1 / sqrt(uses + 1). Rows that have no loss yet come first.

The ledger must keep them: `--ledger.statistic ema --ledger.decay 0.8 --ledger.variance True`.

n rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.selector import Rows, Selection, check_needs

UNSEEN = 1e30
"""Above any loss."""


@dataclass(frozen=True)
class Ucb:
    """Upper confidence bounds of the losses that the ledger remembers."""

    confidence: float = 1.0
    needs = frozenset({"ledger_value", "ledger_variance", "usage_count", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 <= self.confidence < math.inf:
            raise ValueError(f"confidence must be at least 0, got {self.confidence}")

    @property
    def records(self) -> Literal["loss"]:
        """The ledger keeps the running mean and variance of the loss."""
        return "loss"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The bound (n,) float32."""
        check_needs(self, rows)
        inflated = 1 + 1 / (rows["usage_count"].float() + 1).sqrt()
        deviation = rows["ledger_variance"].float().clamp_min(0).sqrt() * inflated
        return (rows["ledger_value"].float() + self.confidence * deviation).nan_to_num(nan=UNSEEN)

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score: there is no noise."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The `keep` rows of the highest bound, weight 1 each."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
