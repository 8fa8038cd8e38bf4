"""Coreset: cover the pool, each time with the row that is farthest from what is chosen (greedy k-center).

Source: Sener and Savarese 2018 (arXiv:1708.00489), Algorithm 1, on embeddings of unit norm. The radius within which
every row has a chosen one is at most twice the least possible. It is the most diverse rule and so the one that takes
every outlier: on the planted pool of the spec (3% outliers, 1,000 of 9,200 kept) 30% of what it keeps are outliers.
Deviation: the paper begins with a labelled set; here the first row is drawn by the seed.

N rows, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order, chosen_rows, random_place, unit_rows
from curation.numerics.greedy import k_center
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows, take


@dataclass(frozen=True)
class Coreset:
    """The most diverse rows; each distance is the Euclidean one of unit vectors."""

    column: str = "image_embedding"
    """Which vectors: ours, or a later column such as one of `jobs.fit features`."""
    fixed_size = True
    unbiased = False

    @property
    def needs(self) -> frozenset[str]:
        """The vectors, and the uid for the first row and for ties."""
        return frozenset({self.column, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Distance (n,) float32 from the rows' mean: what lies outside is rather kept. The choice is not made by it."""
        check_needs(self, rows)
        vectors_ND = unit_rows(rows, self.column)
        return torch.linalg.vector_norm(vectors_ND - vectors_ND.mean(dim=0), dim=1)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows in the order of choice, weight 1 each; the same samples for any order of the rows."""
        check_needs(self, rows)
        keep = check_keep(keep, num_rows(rows))
        order = canonical_order(rows)
        if not keep:
            return chosen_rows(order, order[:0])
        rows = take(rows, order)
        first = random_place(rows, rng)
        return chosen_rows(order, k_center(unit_rows(rows, self.column), keep=keep, first=first))
