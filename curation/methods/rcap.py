"""RCAP: budgets for classes by how much is left to learn in them, and within a class a draw by loss.

Source: RCAP, in its authors' code (no arXiv number of it is known to us), as a rival of arXiv:2603.04981. A row's last
loss, clipped to [0, log C] and log C at first, gives its importance: the softmax of loss / temperature within its
class. A class gets a budget in proportion to sqrt(importance of its rows that the last round chose * its share of the
pool), and so many of its rows are drawn without replacement, p = importance.

Traps of the published code, mended here: it spreads what a full class cannot take by the whole budget again, and rounds
every class up, so that a round exceeds its budget (`published_budgets`); ours keeps exactly `keep`. The importance of
the last round's rows alone it is that tells classes apart; that is kept as published.

n rows, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order, chosen_rows
from curation.numerics.sampling import gumbel_top_k
from curation.selector import Rows, Selection, check_keep, check_needs


def class_budgets(wanted_C: Tensor, sizes_C: Tensor, keep: int) -> Tensor:
    """Rows (C,) int64 of each class: in proportion to `wanted_C` (C,) >= 0, none above its size, `keep` in all."""
    wanted_C, sizes_C = wanted_C.double().clamp_min(1e-12), sizes_C.double()
    is_full = torch.zeros_like(sizes_C, dtype=torch.bool)
    budget_C = keep * wanted_C / wanted_C.sum()
    while bool((budget_C > sizes_C).any()):
        is_full |= budget_C >= sizes_C
        rest = wanted_C.masked_fill(is_full, 0)
        left = keep - float(sizes_C[is_full].sum())
        budget_C = torch.where(is_full, sizes_C, left * rest / rest.sum().clamp_min(1e-300))
    rows_C = budget_C.floor()
    # The largest remainders get what rounding down has left, where the class has rows for it.
    while (left := keep - int(rows_C.sum())) > 0:
        remainder_C = torch.where(rows_C < sizes_C, budget_C - rows_C, -torch.inf)
        first = remainder_C.argsort(descending=True, stable=True)[:left]
        rows_C[first[remainder_C[first] > -torch.inf]] += 1
    return rows_C.long()


def published_budgets(wanted_C: Tensor, sizes_C: Tensor, keep: int) -> Tensor:
    """Rows (C,) int64 of each class as the authors' code has them; their sum may exceed `keep`."""
    wanted_C, sizes_C = wanted_C.double(), sizes_C.double()
    share_C = keep * wanted_C / wanted_C.sum() / sizes_C
    while bool((share_C > 1).any()):
        share_C[share_C > 1] = 1
        rest = share_C < 1
        share_C[rest] = keep * wanted_C[rest] / wanted_C[rest].sum() / sizes_C[rest]
    return torch.ceil(share_C * sizes_C).long()


@dataclass(frozen=True)
class Rcap:
    """Rows of each class by the losses that the ledger remembers."""

    temperature: float = 2.0
    """The code's beta: 1/3, 1/2, 1, 2 or 3."""

    needs = frozenset({"ledger_value", "last_step", "label", "uid", "round", "last_round_step"})
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def records(self) -> Literal["loss"]:
        """The ledger keeps the last loss; a row that was not chosen keeps its own."""
        return "loss"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The last loss (n,) float32, clipped to [0, log C]; log C where there is none."""
        check_needs(self, rows)
        highest = math.log(max(2, len(rows["label"].unique())))
        return rows["ledger_value"].float().nan_to_num(nan=highest).clamp(0, highest)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """Exactly `keep` rows, weight 1 each."""
        check_needs(self, rows)
        keep = check_keep(keep, len(rows["label"]))
        order = canonical_order(rows)
        logits = self.score(rows, progress)[order].double() / self.temperature
        classes, place = rows["label"][order].unique(return_inverse=True)
        sizes_C = torch.bincount(place, minlength=len(classes))
        importance_C, last_C = torch.zeros(2, len(classes), dtype=torch.float64, device=logits.device)
        importance = logits.exp()  # losses lie in [0, log C]: no overflow
        importance_C.index_add_(0, place, importance)
        was_chosen = rows["ledger_value"][order].isfinite()
        was_chosen &= rows["last_step"][order] >= rows["last_round_step"]
        if not int(rows["round"]):
            was_chosen = torch.ones_like(was_chosen)
        last_C.index_add_(0, place, importance * was_chosen)
        budgets_C = class_budgets((last_C / importance_C * sizes_C).sqrt(), sizes_C, keep)
        chosen = [torch.zeros(0, dtype=torch.int64, device=order.device)]
        for number, budget in enumerate(budgets_C.tolist()):
            members = (place == number).nonzero().flatten()
            chosen.append(members[gumbel_top_k(logits[members], budget, rng)])
        return chosen_rows(order, torch.cat(chosen))
