"""Nearest neighbours, k-means by faiss, and the centroid nearest to each row: how a pool is cut into clusters.

Johnson et al. 2017 (arXiv:1702.08734). Squared distances are |x|^2 + |y|^2 - 2xy in float32, a matrix product; where
that cancels, near duplicates, they are summed again from the difference, so equal rows are at distance 0. The
centroids are fitted on a seeded sample of the rows, 256 per cluster unless told otherwise (faiss's own figure: more
rows hardly move a centroid), on the CPU, where the same rows, seed and version of faiss give the same centroids for any
number of threads. Assigning is exact search, a block of rows at a time.

N rows, D embedding, K clusters, M others, Q neighbours.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

ROWS_PER_CLUSTER = 256
CANCELS = 1e-3
"""Below this share of |x|^2 + |y|^2 a squared distance is summed from the difference: float32 leaves no more than three
digits of it."""


def fit_centroids(
    rows_ND: Tensor,
    *,
    num_clusters: int,
    seed: int,
    max_rows: int | None = None,
    num_iterations: int = 20,
    spherical: bool = True,
) -> Tensor:
    """Centroids (K, D) float32 of k-means, on the CPU.

    `max_rows` is how many rows are sampled to fit on, 256 per cluster by default. `spherical`: centroids have unit
    norm, for rows that have it too. ValueError if rows are not finite (N, D), or there are fewer of them, or fewer in
    the sample, than clusters.
    """
    _check_rows("rows", rows_ND)
    max_rows = ROWS_PER_CLUSTER * num_clusters if max_rows is None else max_rows
    if not 1 <= num_clusters <= min(max_rows, len(rows_ND)):
        raise ValueError(
            f"num_clusters must be in [1, {min(max_rows, len(rows_ND))}], the rows to fit on, got {num_clusters}"
        )
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if len(rows_ND) > max_rows:
        sample = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(seed))[:max_rows]
        rows_ND = rows_ND[sample.to(rows_ND.device)]
    kmeans = faiss.Kmeans(
        rows_ND.shape[1],
        num_clusters,
        niter=num_iterations,
        seed=seed,
        spherical=spherical,
        gpu=False,
        # What was sampled above is what is fitted on: faiss neither samples again nor warns that it is little.
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows_ND),
    )
    kmeans.train(_float32_array(rows_ND))
    return torch.from_numpy(np.array(kmeans.centroids, dtype=np.float32))


def nearest_centroids(rows_ND: Tensor, centroids_KD: Tensor, *, block_rows: int = 65_536) -> Tensor:
    """The cluster of each row, (N,) int64: the centroid of the smallest Euclidean distance.

    For rows and centroids of unit norm that is the one of the highest cosine. ValueError if either is not finite and
    2-D, their widths differ, or there is no centroid.
    """
    _check_rows("rows", rows_ND)
    _check_rows("centroids", centroids_KD)
    if rows_ND.shape[1] != centroids_KD.shape[1] or not len(centroids_KD):
        raise ValueError(
            f"centroids must be (K, {rows_ND.shape[1]}) with K >= 1 to fit the rows, got {tuple(centroids_KD.shape)}"
        )
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    centroids = _float32_array(centroids_KD)
    clusters = torch.zeros(len(rows_ND), dtype=torch.int64)
    for first in range(0, len(rows_ND), block_rows):
        block = slice(first, first + block_rows)
        _, nearest_N1 = faiss.knn(_float32_array(rows_ND[block]), centroids, 1)
        clusters[block] = torch.from_numpy(nearest_N1[:, 0])
    return clusters.to(rows_ND.device)


def squared_distances(rows_ND: Tensor, others: Tensor, norms2_N: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) float32 of float32 rows to those at `others` (M,); 0 between equal rows.

    `norms2_N` are the rows' squared norms. Costs N M D multiply-adds.
    """
    norms2_M = norms2_N[others]
    distances_NM = (norms2_N[:, None] + norms2_M).addmm_(rows_ND, rows_ND[others].T, alpha=-2)
    if not distances_NM.numel():
        return distances_NM
    # Against one number first: a comparison with each pair's own sum would be a third of all the time.
    row, other = (distances_NM < CANCELS * (norms2_N.max() + norms2_M.max())).nonzero(as_tuple=True)
    cancels = distances_NM[row, other] < CANCELS * (norms2_N[row] + norms2_M[other])
    row, other = row[cancels], other[cancels]
    for at in range(0, len(row), 8192):  # a pool of copies has many such pairs, so never all at once
        near = slice(at, at + 8192)
        difference = rows_ND[row[near]] - rows_ND[others[other[near]]]
        distances_NM[row[near], other[near]] = difference.square().sum(dim=1)
    return distances_NM


def nearest_distances(rows_ND: Tensor, num_neighbors: int, *, block_rows: int = 1024) -> Tensor:
    """Euclidean distances (N, Q) float32 of each row to its Q nearest others, nearest first.

    A row is left out of its own neighbours by its place, not by its distance, so a copy of it is one at distance 0.
    Costs N^2 D multiply-adds, memory block_rows x N float32. ValueError if rows are not finite (N, D) or Q is not in
    [1, N - 1].
    """
    _check_rows("rows", rows_ND)
    if not 1 <= num_neighbors < len(rows_ND):
        raise ValueError(f"num_neighbors must be in [1, {len(rows_ND) - 1}], the other rows, got {num_neighbors}")
    rows_ND = rows_ND.float()
    norms2_N = rows_ND.square().sum(dim=1)
    nearest_NQ = rows_ND.new_empty(len(rows_ND), num_neighbors)
    for first in range(0, len(rows_ND), block_rows):
        block = torch.arange(first, min(first + block_rows, len(rows_ND)), device=rows_ND.device)
        distances_BN = squared_distances(rows_ND, block, norms2_N).T.contiguous()
        distances_BN[torch.arange(len(block), device=block.device), block] = torch.inf
        nearest_NQ[block] = distances_BN.topk(num_neighbors, dim=1, largest=False).values
    return nearest_NQ.clamp_min_(0).sqrt_()


def similar_pairs(unit_ND: Tensor, *, min_cosine: float) -> Tensor:
    """All pairs (P, 2) int64 of places i < j of unit rows with a cosine above `min_cosine`: faiss's exact scan.

    Costs N^2 D multiply-adds; sorted. ValueError if rows are not finite (N, D).
    """
    _check_rows("rows", unit_ND)
    rows_ND = _float32_array(unit_ND)
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND)
    begins, _, others = index.range_search(rows_ND, min_cosine)
    places = np.repeat(np.arange(len(rows_ND)), np.diff(begins.astype(np.int64)))
    pairs_P2 = np.stack([places, others], axis=1)[places < others]
    return torch.from_numpy(pairs_P2[np.lexsort((pairs_P2[:, 1], pairs_P2[:, 0]))])


def _check_rows(name: str, rows_ND: Tensor) -> None:
    if rows_ND.ndim != 2 or not rows_ND.dtype.is_floating_point:
        raise ValueError(f"{name} must be floats (N, D), got {rows_ND.dtype} {tuple(rows_ND.shape)}")
    finite = torch.isfinite(rows_ND).all(dim=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, row {int((~finite).nonzero()[0])} is not")


def _float32_array(rows_ND: Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows_ND.detach().float().cpu().numpy())
