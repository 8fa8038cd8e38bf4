"""A pool cut into buckets that fit in memory: near rows together, by k-means, or equal hashes together.

The centroids are fitted on a sample. A cluster that holds more rows than one bucket may (a blank image a million times
over) is cut further by the hash of the uid, into as many parts as the sample lets expect; rows of different parts are
not compared. A row's bucket is decided by itself, so it is the same for any order and number of workers.

N rows, D embedding, K clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from curation.numerics.neighbors import ROWS_PER_CLUSTER, fit_centroids, nearest_centroids
from curation.numerics.sampling import hash_words

MAX_SAMPLE_ROWS = 1_000_000
"""Rows that centroids are fitted on at most: 2 GB at a width of 512."""


class Cutting(NamedTuple):
    """How rows are cut. Bucket numbers count the parts of cluster 0, then those of cluster 1, and so on."""

    centroids_KD: np.ndarray
    parts_K: np.ndarray
    """Into how many parts each cluster is cut, (K,) int64."""

    @property
    def num_buckets(self) -> int:
        """How many buckets there are."""
        return int(self.parts_K.sum())


def num_clusters_for(num_rows: int, *, bucket_rows: int) -> int:
    """How many clusters cut a pool into buckets of about `bucket_rows` rows, as far as a sample can tell them apart."""
    return max(1, min(-(-num_rows // bucket_rows), MAX_SAMPLE_ROWS // 32))


def sample_share(num_rows: int, *, num_clusters: int) -> float:
    """Share of the rows to fit on."""
    return min(1.0, min(ROWS_PER_CLUSTER * num_clusters, MAX_SAMPLE_ROWS) / max(num_rows, 1))


def fit_cutting(unit_ND: Tensor, *, num_clusters: int, num_rows: int, most_rows: int, seed: int) -> Cutting:
    """A cutting of a pool of `num_rows` rows, fitted on a sample of it; expected buckets hold at most `most_rows`."""
    num_clusters = min(num_clusters, len(unit_ND))
    centroids = fit_centroids(unit_ND, num_clusters=num_clusters, seed=seed, max_rows=len(unit_ND))
    sizes = torch.bincount(nearest_centroids(unit_ND, centroids), minlength=num_clusters).numpy()
    expected = sizes * (num_rows / len(unit_ND))
    return Cutting(centroids.numpy(), np.maximum(np.ceil(expected / most_rows), 1).astype(np.int64))


def buckets_by_cluster(cutting: Cutting, unit_ND: Tensor, words_N2: np.ndarray) -> np.ndarray:
    """The bucket of each row, (N,) int64, of its unit vector and its uid."""
    clusters = nearest_centroids(unit_ND, torch.from_numpy(np.array(cutting.centroids_KD))).numpy()
    begins = np.cumsum(cutting.parts_K) - cutting.parts_K
    part = hash_words(words_N2, seed=0) % cutting.parts_K[clusters].astype(np.uint64)
    return begins[clusters] + part.astype(np.int64)


def buckets_by_hash(words_N2: np.ndarray, *, num_buckets: int) -> np.ndarray:
    """The bucket of each row, (N,) int64, of a hash (N, 2) uint64 of its own."""
    return (hash_words(words_N2, seed=0) % np.uint64(num_buckets)).astype(np.int64)
