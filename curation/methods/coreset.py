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

from curation.methods._in_memory import canonical_order, check_bucket_sizes, chosen_rows, random_place, unit_rows
from curation.numerics.greedy import k_center
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows


@dataclass(frozen=True)
class Coreset:
    """The most diverse rows; each distance is the Euclidean one of unit vectors."""

    column: str = "image_embedding"
    """Which vectors: ours, or a later column such as one of `jobs.fit features`."""
    exact_rows: int = 100_000
    """Up to so many rows of a pool are chosen from as one set."""
    bucket_rows: int = 20_000
    """Above that, k-means cuts the pool into buckets of about this many, and each has its quota."""
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        check_bucket_sizes(self)

    @property
    def needs(self) -> frozenset[str]:
        """The vectors, and the uid for the first row and for ties."""
        return frozenset({self.column, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    @property
    def bucket_by(self) -> Literal["clusters"]:
        """A large pool is cut by k-means."""
        return "clusters"

    @property
    def quota(self) -> Literal["even"]:
        """Evenly: a share by rows would give the dense regions what diversity is to take from them."""
        return "even"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Distance (n,) float32 from the rows' mean: what lies outside is rather kept. The choice is not made by it."""
        check_needs(self, rows)
        return _distance_from_mean(unit_rows(rows, self.column))

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows in the order of choice, weight 1 each; the same samples for any order of the rows."""
        check_needs(self, rows)
        return self.select_scored(rows, check_keep(keep, num_rows(rows)), progress, rng)[0]

    def select_scored(self, rows: Rows, keep: int, progress: float, rng: Generator) -> tuple[Selection, Tensor]:
        """The same, and all rows' scores (n,)."""
        order, vectors_ND = canonical_order(rows), unit_rows(rows, self.column)
        chosen_K = order[:0]
        if keep:
            first = random_place(rows["uid"][order], rng)
            chosen_K = k_center(vectors_ND[order], keep=keep, first=first)
        return chosen_rows(order, chosen_K), _distance_from_mean(vectors_ND)


def _distance_from_mean(vectors_ND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors_ND - vectors_ND.mean(dim=0), dim=1)
