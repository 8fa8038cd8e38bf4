"""Shift-Gsample: drop what a rater finds plainest, and draw the rest by a Gaussian over the rating's percentile.

Source: Alchemist, 2025 (arXiv:2512.16905), Eq. 11, and the configurations of its code. A rater taught by validation
loss (`jobs.fit rater`) rates low-loss rows high; its top is plain, its bottom chaotic, and what trains a generator
best lies between. Percentile 0 is the highest rating. Rules:

    shift     p(i) ~ exp(-(q_i - m)^2 / (2 s^2)) on q in [n, 1], without replacement by Gumbel top-k (arXiv:1903.06059)
    gaussian  the same with n = 0, m = 1/2, s = 1/6: no shift
    top       the highest ratings
    block     rows of [block_start, block_start + block_width), evenly
    random    all rows evenly

Eq. 11 leaves m, s and replacement open. Completed here: m = n + (1 - n) / 2, s = (1 - n) / 6, without replacement, so
m = 0.625 and s = 0.125 for the published head cut n = 0.25. At a keep fraction of a half or more the shape hardly
matters: the rule becomes "drop the head and a part of the tail"; the audit of a selection tells what each decile kept.

Deviations. Noise is a hash of the uid, so the rows that are drawn depend on no order and no number of workers. Rows of
the cut head, or outside the block, come after all others instead of never, for a selection keeps as many as it is
told; recipes refuse a keep fraction that would need them. The released head cuts are smaller for keep fractions of 80%
(0.15) and 90% (0.05), `published_head_cut`: name them, for a selector does not know how many are kept.

n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key, uid_column_words
from curation.numerics.sampling import hash_uniform
from curation.selector import Rows, Selection, check_needs

LAST = -1e6
"""Log weight of rows that are taken only when nothing else is left: far below that of any percentile."""
MIN_SPREAD = 1e-3
DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def published_head_cut(keep_fraction: float) -> float:
    """n by keep fraction, from the names of the authors' configurations: alchemist.md, Sec. 4.4."""
    return 0.25 if keep_fraction <= 0.5 else 0.15 if keep_fraction <= 0.8 else 0.05


def gaussian_log_weight(percentile: Tensor, *, head_cut: float, mean: float, spread: float) -> Tensor:
    """Eq. 11's log p (n,) but for a constant; LAST in the head that is cut."""
    log_weight = -((percentile - mean) ** 2) / (2 * spread**2)
    return torch.where(percentile < head_cut, LAST, log_weight)


def gumbel_of(uid_N2: Tensor, seed: int) -> Tensor:
    """Standard Gumbel noise (n,) float64 from hash(uid, seed)."""
    # hash_uniform is a multiple of 2**-53, and 0 has no logarithm.
    uniform = torch.from_numpy(hash_uniform(uid_column_words(uid_N2), seed)).clamp_min(2.0**-54)
    return -(-uniform.log()).log()


@dataclass(frozen=True)
class Alchemist:
    """Rows by the percentile of their rating, a column that `jobs.curate --columns` makes."""

    rule: Literal["shift", "gaussian", "top", "block", "random"] = "shift"
    head_cut: float = 0.25
    """n, for shift."""
    mean: float | None = None
    """m, for shift; none given: the middle of what is left of the head cut."""
    spread: float | None = None
    """s, for shift; none given: a sixth of it."""
    block_start: float = 0.4
    """The authors' best blocks of width 0.2 start at 0.4 and 0.6."""
    block_width: float = 0.2
    column: str = "rating_percentile"
    """A percentile of any other score makes that score's top-k and Gaussian."""
    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if not 0 <= self.head_cut < 1:
            raise ValueError(f"head_cut must be in [0, 1), got {self.head_cut}")
        if self.spread is not None and self.spread < MIN_SPREAD:
            raise ValueError(f"spread must be at least {MIN_SPREAD}, got {self.spread}")
        if self.block_width <= 0 or self.block_start < 0 or self.block_start + self.block_width > 1 + 1e-9:
            raise ValueError(f"a block must lie in [0, 1], got {self.block_start} and width {self.block_width}")

    @property
    def needs(self) -> frozenset[str]:
        """The percentile, and the uid for noise and ties."""
        return frozenset({self.column, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    @property
    def most_kept(self) -> float:
        """The largest keep fraction for which nothing outside the rule's range is taken."""
        return {"shift": 1 - self.head_cut, "block": self.block_width}.get(self.rule, 1.0)

    @property
    def audited_by(self) -> tuple[str, tuple[float, ...]]:
        """A column and the edges by which every selection tells what it kept: deciles of the percentile."""
        return self.column, DECILES

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The rating's order (n,) float32, 1 for the highest. It is not what shift prefers."""
        check_needs(self, rows)
        return 1 - rows[self.column].float()

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """Log weight plus Gumbel noise (n,) float32; of rule top the score alone. A row without a percentile: NaN."""
        check_needs(self, rows)
        percentile = rows[self.column].double()
        if self.rule == "top":
            return self.score(rows, progress)
        noise = gumbel_of(rows["uid"], seed).to(percentile.device)
        return (self._log_weight(percentile) + noise).float()

    def _log_weight(self, percentile: Tensor) -> Tensor:
        if self.rule == "shift":
            left = 1 - self.head_cut
            mean = self.head_cut + left / 2 if self.mean is None else self.mean
            spread = left / 6 if self.spread is None else self.spread
            return gaussian_log_weight(percentile, head_cut=self.head_cut, mean=mean, spread=spread)
        if self.rule == "gaussian":
            return gaussian_log_weight(percentile, head_cut=0.0, mean=0.5, spread=1 / 6)
        even = torch.zeros_like(percentile)
        if self.rule == "block":
            inside = (percentile >= self.block_start) & (percentile < self.block_start + self.block_width)
            even = torch.where(inside, even, LAST)
        return torch.where(percentile.isnan(), percentile, even)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """`keep` rows, weight 1 each."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)


def shift_gsample(rating: np.ndarray, keep_fraction: float, *, seed: int, uids: np.ndarray | None = None) -> np.ndarray:
    """Places (k,) of round(keep_fraction * n) rows by the published head cut, ratings (n,) in memory.

    `uids` (n, 2) int64; rows are numbered if there are none. ValueError if more are asked for than the head cut leaves.
    """
    selector = Alchemist(head_cut=published_head_cut(keep_fraction))
    if keep_fraction > selector.most_kept:
        raise ValueError(f"keep_fraction must be at most {selector.most_kept}, 1 - head_cut, got {keep_fraction}")
    n = len(rating)
    percentile = np.empty(n)
    percentile[np.argsort(-rating, kind="stable")] = (np.arange(n) + 0.5) / n
    own = np.stack([np.zeros(n, np.int64), np.arange(n)], axis=1) if uids is None else uids
    rows = {"rating_percentile": torch.from_numpy(percentile), "uid": torch.from_numpy(own)}
    keep = round(keep_fraction * n)
    return selector.select(rows, keep, 0.0, Generator().manual_seed(seed)).indices.numpy()
