"""Exact duplicates: of samples with the very same image bytes, only the preferred one stays.

Source: the first stage of the deduplication of DataComp (Gadre et al. 2023, arXiv:2304.14108, App.), by hash of the
file. A copy is told by the first 128 of the image's sha256; preferred is the highest value of a column, such as the
CLIP score, which asks which of several captions fits; ties by the hash of the uid. Over a pool the rows are compared
within buckets by that hash, so none is missed.

N rows; 2 words of a hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._in_memory import canonical_order, check_bucket_sizes, order_of_preference, rows_that_stay
from curation.selector import Rows, Selection, check_needs


@dataclass(frozen=True)
class ExactDuplicates:
    """One of each group of equal images; how many rows that leaves is the outcome."""

    prefer: str = "clip_score"
    """A column, of which the highest value is preferred."""
    column: str = "sha256"
    """(n, 2) int64, the bit patterns of a hash's first two words."""
    exact_rows: int = 1_000_000
    """Up to so many rows are one bucket."""
    bucket_rows: int = 500_000
    """Above that, the pool is cut into buckets of about this many; the outcome does not depend on it."""
    fixed_size = False
    unbiased = False

    def __post_init__(self) -> None:
        check_bucket_sizes(self)

    @property
    def needs(self) -> frozenset[str]:
        """The hash, what is preferred, and the uid for ties."""
        return frozenset({self.column, self.prefer, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    @property
    def bucket_by(self) -> Literal["hashes"]:
        """How a large pool is cut."""
        return "hashes"

    @property
    def above(self) -> float:
        """First ones score 1, copies 0."""
        return 0.0

    def score(self, rows: Rows, progress: float) -> Tensor:
        """0 for a copy of a preferred row, else 1, (n,) float32."""
        check_needs(self, rows)
        order = canonical_order(rows)
        by_preference = order[order_of_preference(rows[self.prefer][order])]
        words_N2 = rows[self.column][by_preference].cpu().numpy()
        _, first = np.unique(words_N2, axis=0, return_index=True)
        scores = torch.zeros(len(order), device=order.device)
        scores[by_preference[torch.from_numpy(first).to(order.device)]] = 1.0
        return scores

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The rows that stay, in their order, weight 1 each; `keep` must be None. Draws nothing from `rng`."""
        return rows_that_stay(self, rows, keep=keep, progress=progress)
