from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from curation.numerics.diversity import duplicate_share, effective_clusters


def test_equal_clusters_count_as_many_as_they_are():
    for num_clusters in (1, 2, 63):
        assert effective_clusters(torch.arange(num_clusters).repeat(5)) == pytest.approx(num_clusters)


def test_three_rows_to_one_are_exp_of_their_entropy():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_clusters(torch.tensor([7, 7, 10_000_000, 7])) == pytest.approx(math.exp(entropy))


def test_a_cluster_of_one_row_counts_little_beside_a_large_one():
    assert 1 < effective_clusters(torch.tensor([0] * 999 + [1])) < 1.01


@pytest.mark.parametrize("wrong", [torch.zeros(0, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 1).long()])
def test_assignments_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"assignments must be integers \(N,\) with N >= 1, got torch"):
        effective_clusters(wrong)


def test_rows_with_a_twin_are_counted_and_a_row_is_not_its_own_twin():
    angles = torch.tensor([0.0, 0.01, 1.0, 2.0, 2.01, 2.02])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    for block_rows in (1, 2, 4, 100):
        assert duplicate_share(rows, threshold=math.cos(0.015), block_rows=block_rows) == pytest.approx(5 / 6)
        assert duplicate_share(rows, threshold=math.cos(0.005), block_rows=block_rows) == 0
    assert duplicate_share(rows[:1], threshold=0.5) == 0
    assert duplicate_share(3 * rows, threshold=-0.9) == 1


def test_the_share_is_that_of_the_whole_matrix():
    rows = F.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = rows @ rows.T - 2 * torch.eye(500)
    for threshold in (0.85, 0.9, 0.95):
        expected = (cosines >= threshold).any(dim=1).double().mean().item()
        assert 0 < expected < 1
        for block_rows in (64, 499, 1024):
            assert duplicate_share(rows, threshold=threshold, block_rows=block_rows) == expected


def test_equal_rows_of_half_precision_are_twins():
    rows = F.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), dim=1).half()
    assert duplicate_share(torch.cat([rows, rows[:10]]), threshold=0.9999) == pytest.approx(20 / 60)


@pytest.mark.parametrize(("rows", "fields", "complaint"), [
    (torch.ones(0, 2), {"threshold": 0.9}, r"embeddings must be \(N, D\) with N >= 1, got \(0, 2\)"),
    (torch.ones(3), {"threshold": 0.9}, r"embeddings must be \(N, D\) with N >= 1, got \(3,\)"),
    (torch.ones(3, 2), {"threshold": 1.1}, r"threshold must be in \(-1, 1\], got 1.1"),
    (torch.ones(3, 2), {"threshold": float("nan")}, r"threshold must be in \(-1, 1\], got nan"),
    (torch.ones(3, 2), {"threshold": 0.9, "block_rows": 0}, "block_rows must be at least 1, got 0"),
    (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), {"threshold": 0.9}, "row 1 has norm 0.0"),
    (torch.tensor([[torch.nan, 0.0]]), {"threshold": 0.9}, "row 0 has norm nan"),
])  # fmt: skip
def test_what_has_no_cosine_is_refused(rows, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        duplicate_share(rows, **fields)
