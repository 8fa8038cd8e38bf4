"""What is known of the rows that a step trained on: how diverse they are, how many are copies, how many known junk.

Joint selection may fill a batch from a few clusters, or with copies of one image (jest.md, trap 7); these figures show
it. They look at the reference's image embeddings, so they do not move with the learner.

b rows, K clusters, D embedding.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from curation.numerics.diversity import duplicate_share, effective_clusters
from curation.numerics.neighbors import fit_centroids, nearest_centroids
from curation.selector import Rows

DUPLICATE_COSINE = 0.99
NUM_CLUSTERS = 64


class KnownJunk:
    """Which uids are known to be junk: a sorted table in memory, 17 bytes a sample."""

    def __init__(self, uids_N2: np.ndarray, is_junk_N: np.ndarray):
        """uids (N, 2) uint64 words; is_junk (N,) bool."""
        uids = _as_pairs(uids_N2)
        order = np.argsort(uids)
        self._uids, self._is_junk = uids[order], is_junk_N[order]

    def share(self, uids_b2: Tensor) -> float | None:
        """Share of the rows (b, 2) int64 that are junk, of those that are known; None if none is."""
        wanted = _as_pairs(uids_b2.cpu().numpy().view(np.uint64))
        places = np.searchsorted(self._uids, wanted).clip(max=len(self._uids) - 1)
        is_known = self._uids[places] == wanted
        return float(self._is_junk[places[is_known]].mean()) if is_known.any() else None


def fit_clusters(image_ND: Tensor, *, seed: int) -> Tensor:
    """Centroids (K, D) of the rows that a run's facts are counted in; fewer clusters if there are few rows."""
    return fit_centroids(image_ND.float(), num_clusters=min(NUM_CLUSTERS, len(image_ND)), seed=seed)


def facts_of(selected: Rows, *, centroids_KD: Tensor | None, junk: KnownJunk | None) -> dict[str, float | None]:
    """`effective_clusters`, `duplicate_share` and `junk_share` of the chosen rows; None where it cannot be told."""
    images = selected.get("reference_image_embedding")
    clusters = None
    if images is not None and centroids_KD is not None:
        clusters = effective_clusters(nearest_centroids(images.float().cpu(), centroids_KD))
    return {
        "effective_clusters": clusters,
        "duplicate_share": None if images is None else duplicate_share(images.float(), threshold=DUPLICATE_COSINE),
        "junk_share": None if junk is None else junk.share(selected["uid"]),
    }


def _as_pairs(words_N2: np.ndarray) -> np.ndarray:
    """Rows of two words as one value each, (N,), that numpy sorts and compares as the pair."""
    return np.ascontiguousarray(words_N2, dtype=np.uint64).view([("high", "u8"), ("low", "u8")])[:, 0]
