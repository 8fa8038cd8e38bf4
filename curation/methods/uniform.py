"""Uniform random selection: the baseline that every method must beat at an equal number of samples.

Source: the "no filtering" baseline at a smaller pool size of DataComp (Gadre et al. 2023, arXiv:2304.14108). Each row
draws a number from the hash of its uid and a seed, and the largest are kept: a sample without replacement that is the
same for any order, sharding and number of workers. Deviation: none; DataComp draws from a generator instead of a hash.

N rows; 2 words of a uid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key, uid_column_words
from curation.numerics.sampling import hash_uniform
from curation.selector import Rows, Selection, num_rows


@dataclass(frozen=True)
class Uniform:
    """Every row has the same chance."""

    needs = frozenset({"uid"})
    fixed_size = True
    unbiased = False

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Zeros (n,) float32: no row is better than another, and a random number would pretend that one is."""
        return torch.zeros(num_rows(rows), dtype=torch.float32, device=rows["uid"].device)

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """Uniform numbers (n,) float32 in [0, 1] from hash(uid, seed).

        About one in 2**24 pairs of rows is rounded to the same float32; the tie hash parts them.
        """
        noise = hash_uniform(uid_column_words(rows["uid"]), seed).astype(np.float32)
        return torch.from_numpy(noise).to(rows["uid"].device)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows without replacement, weight 1 each."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
