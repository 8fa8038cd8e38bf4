"""RS2: a fresh random part of the pool in each round, the rival that every dynamic method must beat.

Source: Okanovic et al. 2023, repeated sampling of random subsets (arXiv:2305.18424), as in the code beside RCAP's
(third-party). With replacement each round is a uniform subset of its own. Without, rounds walk through a permutation of
the pool; once what is left of it is shorter than a round it is dropped and a new permutation begins, so where `keep`
divides the pool all rows are used alike after every n / keep rounds.

Deviation: a permutation is the order of a hash of the uid under a seed, so it is the same for any order of the rows.

n rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._in_memory import chosen_rows
from curation.methods._pool_order import uid_column_words
from curation.numerics.sampling import hash_words, tie_hash
from curation.selector import Rows, Selection, check_keep, check_needs, num_rows


@dataclass(frozen=True)
class Rs2:
    """Random rows, weight 1 each; the pool's permutation follows from the run's seed and the round."""

    replacement: bool = False
    """True: each round draws from all rows, whatever earlier rounds drew."""

    needs = frozenset({"uid", "round", "run_seed"})
    fixed_size = True
    unbiased = False

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """Zeros (n,) float32: no row is better than another."""
        return torch.zeros(num_rows(rows), dtype=torch.float32, device=rows["uid"].device)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The round's `keep` rows. The generator is not used: a permutation outlives its round."""
        check_needs(self, rows)
        n = num_rows(rows)
        keep = check_keep(keep, n)
        per_permutation = 1 if self.replacement or not keep else n // keep
        permutation, place = divmod(int(rows["round"]), per_permutation)
        words_n2 = uid_column_words(rows["uid"])
        seed = _seed_of(int(rows["run_seed"]), permutation)
        order = np.lexsort((tie_hash(words_n2), hash_words(words_n2, seed)))[place * keep : (place + 1) * keep]
        return chosen_rows(torch.arange(n, device=rows["uid"].device), torch.from_numpy(order).to(rows["uid"].device))


def _seed_of(run_seed: int, permutation: int) -> int:
    return int.from_bytes(hashlib.sha256(f"rs2/{run_seed}/{permutation}".encode()).digest()[:8], "little")
