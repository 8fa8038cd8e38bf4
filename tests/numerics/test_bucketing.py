from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from curation.numerics.bucketing import (
    Cutting,
    buckets_by_cluster,
    buckets_by_hash,
    fit_cutting,
    num_clusters_for,
    sample_share,
)


def words(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, (n, 2), dtype=np.uint64)


def test_a_cluster_larger_than_a_bucket_may_be_is_cut_by_the_hash_of_the_uid():
    rng = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(2, 8, generator=rng), dim=1)
    rows = F.normalize(centres[torch.tensor([0] * 900 + [1] * 100)] + 0.01 * torch.randn(1000, 8, generator=rng), dim=1)
    cutting = fit_cutting(rows, num_clusters=2, num_rows=10_000, most_rows=3000, seed=0)
    assert sorted(cutting.parts_K.tolist()) == [1, 3]
    buckets = buckets_by_cluster(cutting, rows, words(1000))
    assert cutting.num_buckets == 4
    sizes = np.bincount(buckets, minlength=4)
    small = 0 if cutting.parts_K[0] == 1 else 3
    assert sizes[small] == 100 and (np.delete(sizes, small) > 200).all()


def test_a_row_s_bucket_is_its_own_affair():
    rows, uids = F.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), dim=1), words(50)
    cutting = Cutting(rows[:3].numpy(), np.array([2, 1, 3]))
    whole = buckets_by_cluster(cutting, rows, uids)
    some = np.array([31, 7, 2])
    assert (buckets_by_cluster(cutting, rows[some], uids[some]) == whole[some]).all()
    assert set(whole.tolist()) <= set(range(6))


def test_equal_hashes_share_a_bucket_and_others_spread():
    hashes = words(4000)
    buckets = buckets_by_hash(np.concatenate([hashes, hashes]), num_buckets=8)
    assert (buckets[:4000] == buckets[4000:]).all()
    assert (np.bincount(buckets, minlength=8) > 800).all()


def test_how_many_clusters_and_how_large_a_sample():
    assert num_clusters_for(100, bucket_rows=1000) == 1
    assert num_clusters_for(1_000_001, bucket_rows=1000) == 1001
    assert sample_share(1000, num_clusters=10) == 1.0
    assert sample_share(1_000_000, num_clusters=100) == 0.0256
    assert sample_share(10**10, num_clusters=num_clusters_for(10**10, bucket_rows=5000)) == 1e-4
