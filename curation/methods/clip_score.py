"""CLIP score filtering: keep the pairs whose image and caption agree most.

Source: LAION-400M (Schuhmann et al. 2021, arXiv:2111.02114), which kept pairs with a cosine of at least 0.3; DataComp
(Gadre et al. 2023, arXiv:2304.14108), Sec. 4.2, which keeps the top fraction of the pool instead. A fixed, trained CLIP
embeds image and caption; the cosine of the two is the score and the order. Deviation: exactly `keep` rows are kept and
ties at the cut are parted by the hash of the uid, where DataComp keeps every row at or above a quantile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key
from curation.selector import Rows, Selection


@dataclass(frozen=True)
class ClipScore:
    """The rows with the highest cosine of image and text embedding; the column is made upstream."""

    column: str = "clip_score"
    """Ours, or one that came with the pool, such as DataComp's `json.clip_l14_similarity_score`."""
    fixed_size = True
    unbiased = False

    @property
    def needs(self) -> frozenset[str]:
        """The score's column, and the uid for ties."""
        return frozenset({self.column, "uid"})

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps the score."""
        return "score"

    def score(self, rows: Rows, progress: float) -> Tensor:
        """The score's column (n,) float32, in [-1, 1]."""
        return rows[self.column].float()

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score: there is no noise."""
        return self.score(rows, progress)

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The `keep` highest scores, weight 1 each."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)
