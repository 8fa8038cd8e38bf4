"""Sums over all pairs of what each query's logits with many keys amount to, without the query x key matrix.

Logits are formed in tiles, and only their sums are kept: the matrix of 163,840 queries and as many keys would be 107
GB, a tile is 16 MB. Arithmetic in float32, sums over tiles in float64, no gradients.

Q queries, K keys, D embedding; T queries of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_KEYS = 1024


@torch.no_grad()
def softplus_sums(query_QD: Tensor, key_KD: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Sum over the keys of softplus(logit_scale * query.key + logit_bias), one per query, (Q,) float64.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)), and the logarithm is taken of products of up to 64 factors: on a CPU a
    log1p costs 18 exp, as much as the whole matrix product at D = 512. Relative error about 1e-6.
    """
    _check_widths(query_QD, key_KD)
    sums = torch.zeros(len(query_QD), dtype=torch.float64, device=query_QD.device)
    for queries, logits_KT in _logit_tiles(query_QD, key_KD, logit_scale):
        logits_KT += logit_bias
        sums[queries] += logits_KT.clamp_min(0).sum(dim=0)
        sums[queries] += _log1p_sums_(logits_KT.abs_().neg_().exp_())
    return sums


@torch.no_grad()
def log_sums(query_QD: Tensor, key_KD: Tensor, *, logit_scale: Tensor) -> Tensor:
    """Log of the sum over the keys of exp(logit_scale * query.key), one per query, (Q,) float64; -inf without a key."""
    _check_widths(query_QD, key_KD)
    sums = torch.full((len(query_QD),), -torch.inf, dtype=torch.float64, device=query_QD.device)
    for queries, logits_KT in _logit_tiles(query_QD, key_KD, logit_scale):
        largest = logits_KT.amax(dim=0)  # torch.logsumexp is out of place, which doubles the time of the whole
        tile_sums = largest.double() + logits_KT.sub_(largest).exp_().sum(dim=0).double().log()
        sums[queries] = torch.logaddexp(sums[queries], tile_sums)
    return sums


def _check_widths(query_QD: Tensor, key_KD: Tensor) -> None:
    if query_QD.ndim != 2 or key_KD.ndim != 2 or query_QD.shape[1] != key_KD.shape[1]:
        raise ValueError(
            f"queries and keys must be (Q, D) and (K, D), got {tuple(query_QD.shape)} and {tuple(key_KD.shape)}"
        )


def _logit_tiles(query_QD: Tensor, key_KD: Tensor, logit_scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(a run of queries, their logits (K', T) float32 with up to 1,024 of the keys), until all Q x K are covered."""
    # 16 MB on a CPU: a quarter of it is up to 10 % faster on idle cores, but where cores are shared its many short
    # parallel loops stall, up to tenfold. 0.5 GB on a GPU, which wants more work per launch.
    tile_entries = 1 << (27 if query_QD.is_cuda else 22)
    for first_key in range(0, len(key_KD), TILE_KEYS):
        keys_KD = key_KD[first_key : first_key + TILE_KEYS].float() * logit_scale
        step = tile_entries // len(keys_KD)
        for first in range(0, len(query_QD), step):
            queries = slice(first, first + step)
            yield queries, keys_KD @ query_QD[queries].float().T


def _log1p_sums_(terms_KT: Tensor) -> Tensor:
    """Column sums (T,) of log1p of the terms, which lie in [0, 1] and are overwritten.

    Two factors become one, (1 + a)(1 + b) = 1 + (a + a b + b), so a small term is never rounded away against the 1;
    after six rounds a term is below 2**64.
    """
    for _ in range(6):
        half = (len(terms_KT) + 1) // 2
        first, second = terms_KT[: len(terms_KT) - half], terms_KT[half:]
        first.addcmul_(first, second).add_(second)
        terms_KT = terms_KT[:half]
    return terms_KT.log1p_().sum(dim=0)
