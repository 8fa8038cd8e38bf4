"""Semantic dedup: of rows whose embeddings nearly agree, only the preferred one stays.

Source: SemDeDup (Abbas et al. 2023, arXiv:2303.09540), Algorithm A7.1. Rows are put in order of preference, and a row
falls if its cosine with any row before it reaches 1 - epsilon (`min_cosine`). Preferred is, as in the paper, what is
farthest from the centroid, or what scores best in a column. Of rows that all agree with one another exactly one stays;
a chain, whose ends do not agree, keeps more than one, so look-alikes do not pull a whole class into one group.

Over a pool the rows are compared within buckets of k-means, as in the paper; pairs that its borders part are missed.
Deviations. The centroid is the mean of the bucket's rows (the paper: that of k-means, which it is once converged);
equal preferences are parted by the hash of the uid, so that what stays depends neither on order nor on workers. On a
column of perceptual hashes (`jobs.fit features --network.library phash`) cosine counts bits: two 64-bit hashes at
Hamming distance h have a cosine of 1 - h / 32.

N rows, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from curation.methods._in_memory import (
    canonical_order,
    check_bucket_sizes,
    order_of_preference,
    rows_that_stay,
    unit_rows,
)
from curation.numerics.near_duplicates import highest_cosine_before
from curation.selector import Rows, Selection, check_needs


@dataclass(frozen=True)
class SemanticDedup:
    """One of each group of near copies; how many rows that leaves is the outcome."""

    min_cosine: float = 0.95
    """1 - epsilon. Which one to choose depends on the embedding: look at the sweep that a run leaves."""
    prefer: str = "farthest"
    """farthest: from the mean of the rows. Or a column, of which the highest value is preferred."""
    column: str = "image_embedding"
    """Which vectors: ours, or a later column such as one of `jobs.fit features`."""
    exact_rows: int = 20_000
    """Up to so many rows are one bucket, and every pair is compared."""
    bucket_rows: int = 5_000
    """Above that, the pool is cut into buckets of about this many."""
    fixed_size = False
    unbiased = False

    def __post_init__(self) -> None:
        if not -1 < self.min_cosine <= 1:
            raise ValueError(f"min_cosine must be in (-1, 1], got {self.min_cosine}")
        check_bucket_sizes(self)

    @property
    def needs(self) -> frozenset[str]:
        """The vectors, what is preferred, and the uid for ties."""
        return frozenset({self.column, "uid", *([] if self.prefer == "farthest" else [self.prefer])})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    @property
    def bucket_by(self) -> Literal["clusters"]:
        """How a large pool is cut."""
        return "clusters"

    @property
    def above(self) -> float:
        """Rows that score more than this stay."""
        return 1 - self.min_cosine

    def score(self, rows: Rows, progress: float) -> Tensor:
        """1 - the highest cosine with a preferred row, (n,) float32: 0 for a copy, 2 for the most preferred row."""
        check_needs(self, rows)
        order = canonical_order(rows)
        unit_ND = unit_rows(rows, self.column)[order]
        if self.prefer == "farthest":
            preference = -(unit_ND @ unit_ND.double().mean(dim=0).float()) if len(unit_ND) else unit_ND.new_zeros(0)
        else:
            preference = rows[self.prefer][order]
        by_preference = order_of_preference(preference)
        scores = torch.empty(len(order), device=order.device)
        scores[order[by_preference]] = 1 - highest_cosine_before(unit_ND[by_preference])
        return scores

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The rows that stay, in their order, weight 1 each; `keep` must be None. Draws nothing from `rng`."""
        return rows_that_stay(self, rows, keep=keep, progress=progress)
