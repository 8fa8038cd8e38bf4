"""Epsilon-greedy dynamic pruning: the rows of the highest last loss, and a few others by chance.

Source: Raju et al. 2021, accelerating deep learning with dynamic data pruning (arXiv:2111.12621); its constants are not
public to us, the rule is that of the third-party code beside RCAP's. A round takes (1 - epsilon) * keep rows of the
highest last loss and fills up with rows drawn evenly from the rest. Rows that have no loss yet come first. With epsilon
0 it is the static loss-greedy rule, which under label noise trains on the wrong labels. Selected anew every round.

n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order, chosen_rows
from curation.selector import Rows, Selection, check_keep, check_needs

UNSEEN = 1e30
"""Above any loss."""


@dataclass(frozen=True)
class EpsilonGreedy:
    """The highest losses of the ledger, and a share by chance."""

    epsilon: float = 0.1
    needs = frozenset({"ledger_value", "uid"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must be in [0, 1], got {self.epsilon}")

    @property
    def records(self) -> Literal["loss"]:
        """The ledger keeps the last loss."""
        return "loss"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The last loss (n,) float32; above all others where there is none."""
        check_needs(self, rows)
        return rows["ledger_value"].float().nan_to_num(nan=UNSEEN)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows, weight 1 each. Equal losses are parted by chance."""
        check_needs(self, rows)
        keep = check_keep(keep, len(rows["ledger_value"]))
        order = canonical_order(rows)
        shuffled = torch.randperm(len(order), generator=rng).to(order.device)
        scores = self.score(rows, progress)[order][shuffled]
        by_loss = shuffled[scores.sort(descending=True, stable=True).indices]
        num_random = round(self.epsilon * keep)
        greedy, rest = by_loss[: keep - num_random], by_loss[keep - num_random :]
        drawn = rest[torch.randperm(len(rest), generator=rng)[:num_random].to(rest.device)]
        return chosen_rows(order, torch.cat([greedy, drawn]))
