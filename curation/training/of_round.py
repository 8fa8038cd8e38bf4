"""The selector of a step whose rows a round has chosen already: all of them, with the weights that they were given.

A method that is asked once a round, over the whole pool, leaves nothing to choose to a step; what a step still owes it
is what the ledger is to remember: the score, or each row's loss before the step.

n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.selector import Rows, Selection, check_needs


@dataclass(frozen=True)
class OfRound:
    """All rows of a batch. `records` is the method's own."""

    records: Literal["score", "loss"]
    fixed_size = True
    unbiased = True

    @property
    def needs(self) -> frozenset[str]:
        """The weights of the round, and the losses where they are remembered."""
        return frozenset({"round_weight"} | ({"learner_loss"} if self.records == "loss" else set()))

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The weights (n,) float32."""
        check_needs(self, rows)
        return rows["round_weight"].float()

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """All rows, in their order. ValueError if not all are to be kept."""
        weights = self.score(rows, progress)
        if keep != len(weights):
            raise ValueError(f"the round has chosen already, and a step trains on all {len(weights)} rows, not {keep}")
        return Selection(torch.arange(len(weights), device=weights.device), weights)
