"""Distances between the rows of two sets, a block of each at a time, so that memory does not grow with either.

Q queries, M keys, D embedding, R and S rows of a block, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS, BLOCK_KEYS = 2048, 16_384
"""A block of distances is 128 MiB of float32."""


class Block(NamedTuple):
    """Squared Euclidean distances (R, S) of queries `rows` to `keys`."""

    rows: slice
    keys: slice
    squared_RS: Tensor


def squared_distance_blocks(query_QD: Tensor, key_MD: Tensor) -> Iterator[Block]:
    """All blocks, the keys' in the inner loop; float64 if both sets are, else float32.

    Both are moved so that the keys' mean is 0: |q|^2 + |k|^2 - 2 qk of rows far from the origin would be rounding. What
    is below 0 is set to 0. ValueError if the sets are not finite (Q, D) and (M, D).
    """
    for name, rows_ND in (("queries", query_QD), ("keys", key_MD)):
        # The mean tells without a copy of a million rows: one value that is not finite makes it so.
        if rows_ND.ndim != 2 or not rows_ND.dtype.is_floating_point or not torch.isfinite(_mean(rows_ND)).all():
            raise ValueError(f"{name} must be finite floats (n, D), got {rows_ND.dtype} {tuple(rows_ND.shape)}")
    if query_QD.shape[1] != key_MD.shape[1]:
        raise ValueError(f"queries and keys must be of one width, got {query_QD.shape[1]} and {key_MD.shape[1]}")
    dtype = torch.float64 if query_QD.dtype == key_MD.dtype == torch.float64 else torch.float32
    centre_D = _mean(key_MD).to(dtype)
    for first in range(0, len(query_QD), BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, len(query_QD)))
        query_RD = query_QD[rows].to(dtype) - centre_D
        norms_R1 = query_RD.square().sum(dim=1, keepdim=True)
        for start in range(0, len(key_MD), BLOCK_KEYS):
            keys = slice(start, min(start + BLOCK_KEYS, len(key_MD)))
            key_SD = key_MD[keys].to(dtype) - centre_D
            squared_RS = torch.addmm(norms_R1 + key_SD.square().sum(dim=1), query_RD, key_SD.T, alpha=-2)
            yield Block(rows, keys, squared_RS.clamp_min_(0))


def nearest_keys(query_QD: Tensor, key_MD: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """Distances (Q, K) and places (Q, K) int64 of each query's K nearest keys, nearest first.

    ValueError if K is not in [1, M].
    """
    if not 1 <= num_neighbors <= len(key_MD):
        raise ValueError(f"num_neighbors must be in [1, {len(key_MD)}], the keys, got {num_neighbors}")
    squared_QK = torch.full((len(query_QD), num_neighbors), torch.inf, dtype=torch.float64, device=query_QD.device)
    places_QK = torch.zeros(squared_QK.shape, dtype=torch.int64, device=query_QD.device)
    for block in squared_distance_blocks(query_QD, key_MD):
        here = block.squared_RS.topk(min(num_neighbors, block.squared_RS.shape[1]), dim=1, largest=False)
        squared = torch.cat([squared_QK[block.rows], here.values.double()], dim=1)
        places = torch.cat([places_QK[block.rows], here.indices + block.keys.start], dim=1)
        squared_QK[block.rows], order = squared.topk(num_neighbors, dim=1, largest=False)
        places_QK[block.rows] = places.gather(1, order)
    return squared_QK.sqrt(), places_QK


def nearest_others(rows_ND: Tensor, num_neighbors: int) -> Tensor:
    """Distances (N, K) float64 of each row to its K nearest others, nearest first.

    A row is left out by its place, not by its distance, so a twin of it counts. ValueError if K is not in [1, N - 1].
    """
    if not 1 <= num_neighbors < len(rows_ND):
        raise ValueError(f"num_neighbors must be in [1, {len(rows_ND) - 1}], the other rows, got {num_neighbors}")
    near, places = nearest_keys(rows_ND, rows_ND, num_neighbors + 1)
    is_self = places == torch.arange(len(rows_ND), device=rows_ND.device)[:, None]
    # Where so many twins come first that the row itself is not among them, the last is as good as any.
    is_self[:, -1] |= ~is_self.any(dim=1)
    return near[~is_self].reshape(len(rows_ND), num_neighbors)


def _mean(rows_ND: Tensor) -> Tensor:
    """(D,) float64; 0 of no rows."""
    return rows_ND.sum(dim=0, dtype=torch.float64) / max(1, len(rows_ND))
