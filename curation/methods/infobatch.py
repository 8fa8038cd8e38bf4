"""InfoBatch: train less often on what is known already, and weigh it up so that the gradient stays unbiased.

Source: Qin et al. 2023 (arXiv:2303.04947) and the authors' code. Before each round the rows whose last loss lies below
the pool's mean are pruned: int(keep * their number) of them stay, drawn evenly without replacement, with weight
1 / keep (here exactly their number / how many stay); all others stay with weight 1. From `delta` of the run on nothing
is pruned any more. How many rows stay is the outcome.

Traps of the published code, mended here. Its package resets the weights only where delta * rounds is a whole number of
rounds, and at 30 rounds never does: here a round is judged by its progress alone. It reseeds numpy's global generator;
here the draw is a hash of the uid. Ids are addresses, never floats. `kept_share` is ours: the package has no budget.
Progress is of sample-gradients, so after much pruning the last rounds begin earlier than by counting rounds.

n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order
from curation.selector import Rows, Selection, check_needs

LEAST_KEPT = 0.1
"""The package prunes at most 90% of the rows below the mean."""


@dataclass(frozen=True)
class Infobatch:
    """Rows at or above the mean loss, and some of those below it, weighed up."""

    prune_ratio: float = 0.5
    """Share of the rows below the mean that a round leaves out."""
    delta: float = 0.875
    """Share of the run after which nothing is pruned."""
    kept_share: float | None = None
    """Solve for the prune ratio so that a round keeps this share of the pool; where the rows above the mean are too
    many for that, they too are drawn from, with weights that undo it. `delta` then has no rounds to spend: it is 1."""

    needs = frozenset({"ledger_value", "uid"})
    fixed_size = False
    unbiased = True

    def __post_init__(self) -> None:
        if not 0 <= self.prune_ratio <= 1 or not 0 <= self.delta <= 1:
            raise ValueError(f"prune_ratio and delta must be in [0, 1], got {self.prune_ratio} and {self.delta}")
        if self.kept_share is not None and not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share must be in (0, 1], got {self.kept_share}")

    @property
    def records(self) -> Literal["loss"]:
        """The ledger keeps the last loss, without its weight."""
        return "loss"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The last loss (n,) float32; a row that has none counts as the mean of those that have."""
        check_needs(self, rows)
        losses = rows["ledger_value"].float()
        known = losses[torch.isfinite(losses)]
        mean = known.double().mean().item() if len(known) else 0.0
        return torch.where(torch.isfinite(losses), losses, torch.full_like(losses, mean))

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """ValueError if a number of rows is asked for."""
        if keep is not None:
            raise ValueError(f"keep must be None, how many rows stay is the outcome; got {keep}")
        check_needs(self, rows)
        order = canonical_order(rows)
        scores = self.score(rows, progress)[order]
        is_low = scores < scores.double().mean().float() if len(scores) else scores > 0
        # Rounding may put equal scores beside their own mean.
        is_low &= scores < scores.max() if len(scores) else is_low
        num_low, num_high = int(is_low.sum()), int((~is_low).sum())
        keep_low, keep_high = self._kept(num_low, num_high, progress)
        chosen, weights = [], []
        for group, kept, whole in ((is_low, keep_low, num_low), (~is_low, keep_high, num_high)):
            places = group.nonzero().flatten()
            if kept < whole:
                places = places[torch.randperm(whole, generator=rng)[:kept].to(places.device)]
            chosen.append(places)
            weights.append(torch.full((kept,), whole / kept if kept else 1.0, device=places.device))
        return Selection(order[torch.cat(chosen)], torch.cat(weights).float())

    def _kept(self, num_low: int, num_high: int, progress: float) -> tuple[int, int]:
        """How many rows below the mean stay, and how many of the others."""
        if self.kept_share is not None:
            total = max(1, int(np.round(self.kept_share * (num_low + num_high))))
            low = min(num_low, max(total - num_high, int(LEAST_KEPT * num_low)))
            return min(low, total), min(num_high, total - min(low, total))
        if progress >= self.delta:
            return num_low, num_high
        kept = int(max(1 - self.prune_ratio, LEAST_KEPT) * num_low)
        return max(kept, min(1, num_low)), num_high
