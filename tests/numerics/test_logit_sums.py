from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.numerics import logit_sums
from curation.numerics.logit_sums import log_sums, softplus_sums


def unit_rows(n, *, seed, width=8):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def logits_QK(query, key, scale, bias=0.0):
    return scale * query.double() @ key.double().T + bias


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (30.0, 5.0), (100.0, 0.0), (1.0, -40.0)])
@pytest.mark.parametrize("num_keys", [1, 2, 3, 63, 64, 65, 1025, 2500])
def test_sums_are_those_of_the_whole_matrix_to_a_relative_error_of_float32(scale, bias, num_keys):
    query, key = unit_rows(50, seed=0), unit_rows(num_keys, seed=1)
    # Float32 rounds a logit itself by up to scale * 2**-22, and softplus and exp pass that on.
    tolerance = {"rtol": 2e-6 + scale * 4e-7, "atol": 0.0}
    sums = softplus_sums(query, key, logit_scale=torch.tensor(scale), logit_bias=torch.tensor(bias))
    assert sums.dtype == torch.float64
    torch.testing.assert_close(
        sums, F.softplus(logits_QK(query, key, scale, bias), threshold=60).sum(dim=1), **tolerance
    )
    expected = logits_QK(query, key, scale).logsumexp(dim=1)
    torch.testing.assert_close(log_sums(query, key, logit_scale=torch.tensor(scale)), expected, rtol=1e-6, atol=4e-5)


def test_every_pair_is_in_one_tile_and_no_tile_is_large():
    query, key = unit_rows(20_000, seed=2), unit_rows(1500, seed=3)
    tiles = list(logit_sums._logit_tiles(query, key, torch.tensor(1.0)))
    assert len(tiles) > 4
    assert all(logits_KT.numel() <= 1 << 22 for _, logits_KT in tiles)
    assert sum(logits_KT.numel() for _, logits_KT in tiles) == 20_000 * 1500
    for tile_queries, logits_KT in tiles:
        assert logits_KT.shape[1] == len(query[tile_queries])


def test_without_a_key_the_sum_is_empty():
    query, none = unit_rows(3, seed=4), torch.zeros(0, 8)
    scalars = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(0.0)}
    assert torch.equal(softplus_sums(query, none, **scalars), torch.zeros(3, dtype=torch.float64))
    assert torch.isneginf(log_sums(query, none, logit_scale=torch.tensor(10.0))).all()
    assert softplus_sums(none, query, **scalars).shape == (0,)


def test_rows_are_left_as_they_were_and_have_no_gradient():
    query, key = unit_rows(5, seed=5).requires_grad_(), unit_rows(6, seed=6)
    before = key.clone()
    sums = softplus_sums(query, key, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(1.0))
    assert not sums.requires_grad
    assert torch.equal(key, before)


def test_half_precision_is_computed_in_float32():
    query, key = unit_rows(5, seed=7).half(), unit_rows(6, seed=8).half()
    sums = softplus_sums(query, key, logit_scale=torch.tensor(50.0), logit_bias=torch.tensor(0.0))
    torch.testing.assert_close(sums, F.softplus(logits_QK(query, key, 50.0)).sum(dim=1), rtol=1e-5, atol=0)


def test_queries_and_keys_of_unlike_width_are_refused():
    with pytest.raises(ValueError, match=r"must be \(Q, D\) and \(K, D\), got \(2, 3\) and \(2, 4\)"):
        log_sums(torch.zeros(2, 3), torch.zeros(2, 4), logit_scale=torch.tensor(1.0))
