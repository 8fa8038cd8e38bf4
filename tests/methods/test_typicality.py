from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from curation.methods.coreset import Coreset
from curation.methods.typicality import (
    Typicality,
    accumulating_rule,
    exponential_typicality,
    inverse_typicality,
    product_rule,
)
from curation.numerics.neighbors import nearest_distances
from curation.selector import Rows, take
from jobs.planted_pool import NUM_OUTLIERS, near_copies_kept, planted_pool


def rows_of(vectors: Tensor) -> Rows:
    uid = torch.randint(-(2**62), 2**62, (len(vectors), 2), generator=Generator().manual_seed(9))
    return {"image_embedding": vectors, "uid": uid}


def select(selector, vectors: Tensor, keep: int, *, seed: int = 0) -> Tensor:
    return selector.select(rows_of(vectors), keep, 0.0, Generator().manual_seed(seed)).indices


def test_the_spec_s_exponential_typicalities():
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]])
    found = exponential_typicality(nearest_distances(rows, 2))
    torch.testing.assert_close(found, torch.tensor([0.3225063, 0.4222289, 0.3853082]))
    line = exponential_typicality(nearest_distances(torch.tensor([[0.0], [1.0], [3.0]]), 1))
    torch.testing.assert_close(line, torch.tensor([0.47236654, 0.47236654, 0.22313016]))


def test_rows_that_are_all_equal_are_all_as_typical():
    distances = nearest_distances(torch.ones(5, 3), 2)
    assert exponential_typicality(distances).tolist() == [1.0] * 5
    torch.testing.assert_close(inverse_typicality(distances), torch.full((5,), 1e5))


def test_inverse_typicality_by_hand_and_its_cap():
    line = inverse_typicality(nearest_distances(torch.tensor([[0.0], [1.0], [3.0]]), 2))
    # Means 2, 1.5, 2.5; the cap lies 0.998 of the way from the second to the most typical.
    low, high = 1 / (2 + 1e-5), 1 / (1.5 + 1e-5)
    torch.testing.assert_close(line, torch.tensor([low, low + 0.998 * (high - low), 1 / (2.5 + 1e-5)]))


def spec_rule(rows: np.ndarray, keep: int, num_neighbors: int) -> list[int]:
    """The spec's section 4.1 line by line, in double precision."""
    distances = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1))
    others = distances + np.diag(np.full(len(rows), np.inf))
    typicality = 1 / (np.sort(others, axis=1)[:, :num_neighbors].mean(1) + 1e-5)
    typicality = np.minimum(typicality, np.quantile(typicality, 0.999))
    chosen = [int(typicality.argmax())]
    nearest = distances[chosen[0]].copy()
    while len(chosen) < keep:
        scores = np.where(nearest > 0, nearest, 1e-12) * typicality
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        nearest = np.minimum(nearest, distances[chosen[-1]])
    return chosen


def test_the_product_rule_is_the_spec_s():
    rows = planted_pool(seed=4, width=8).rows[:400]
    typicality = inverse_typicality(nearest_distances(rows, 20))
    found = product_rule(rows, typicality, keep=100, sd=1, sw=1)
    assert found.tolist() == spec_rule(rows.double().numpy(), 100, 20)


def test_no_copy_is_chosen_before_all_distinct_rows_are():
    distinct = planted_pool(seed=5, width=16).rows[:450]
    rows = torch.cat([distinct, distinct[:50]])
    chosen = select(Typicality(), rows, 500)
    # Rows 450 to 499 are copies of 0 to 49.
    first = [row if row < 450 else row - 450 for row in chosen[:450].tolist()]
    assert len(set(first)) == 450
    assert sorted(chosen.tolist()) == list(range(500))


def test_the_accumulating_rule_by_hand():
    rows, typicality = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([1.0, 4.0, 2.0, 1.0])
    # First row 1 of typicality 4. A = 0, W = 4: squared distances 1, 4, 36 x (5, 6, 5): row 3 of 180.
    # Then A = 36 + 36, W = 5: row 0: (72 + 1) * 6 = 438, row 2: (72 + 4) * 7 = 532.
    assert accumulating_rule(rows, typicality, keep=4, sd=1, sw=1).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("seed", range(3))
def test_t_1_typicality_avoids_outliers_and_copies_and_coreset_collects_outliers(seed):
    pool, keep = planted_pool(seed=seed), 250
    typical = select(Typicality(), pool.rows, keep)
    assert pool.is_outlier[typical].float().mean() < 0.02
    assert near_copies_kept(pool, typical) < 0.01 * keep
    diverse = select(Coreset(), pool.rows, keep, seed=seed)
    assert pool.is_outlier[diverse].sum() > 0.5 * NUM_OUTLIERS


def test_only_the_product_follows_the_sizes_of_the_clusters():
    pool, keep = planted_pool(seed=0), 250
    shares = torch.bincount(pool.cluster[pool.cluster >= 0]) / (pool.cluster >= 0).sum()

    def variation(rule: Literal["product", "lightly", "typiclust", "top"]) -> float:
        cluster = pool.cluster[select(Typicality(rule=rule), pool.rows, keep)]
        of_rule = torch.bincount(cluster[cluster >= 0], minlength=len(shares)) / (cluster >= 0).sum()
        return float((of_rule - shares).abs().sum() / 2)

    product = variation("product")
    assert product < 0.1
    assert variation("lightly") > 2 * product
    assert variation("top") > 5 * product


def test_the_lightly_rule_takes_outliers():
    pool = planted_pool(seed=1)
    chosen = select(Typicality(rule="lightly"), pool.rows, 250)
    assert pool.is_outlier[chosen].sum() > 0.5 * NUM_OUTLIERS


def test_typiclust_takes_the_most_typical_of_each_cluster_by_turns_small_clusters_last():
    angles = torch.tensor([0.0, 0.010, 0.021, 0.033, 0.05, 0.07, 0.1, 1.0, 1.02, 1.05, 1.09, 1.14, 1.2, 2.5, 2.6])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    chosen = select(Typicality(rule="typiclust", max_clusters=3), rows, 15)
    cluster = torch.tensor([0] * 7 + [1] * 6 + [2] * 2)
    assert cluster[chosen].tolist() == [0, 1] * 6 + [0] + [2] * 2
    # Of seven rows the one of the least mean squared distance to its three nearest others.
    squared = (rows[:7, None] - rows[None, :7]).square().sum(-1).fill_diagonal_(torch.inf)
    assert int(chosen[0]) == int(squared.sort(dim=1).values[:, :3].mean(dim=1).argmin())


@pytest.mark.parametrize("rule", ["product", "lightly", "typiclust", "top"])
def test_the_order_of_the_rows_does_not_matter(rule):
    rows = rows_of(planted_pool(seed=2, width=16).rows[:300])
    permutation = torch.randperm(300, generator=Generator().manual_seed(3))
    plain, permuted = (
        Typicality(rule=rule).select(r, 60, 0.0, Generator().manual_seed(1)).indices
        for r in (rows, take(rows, permutation))
    )
    assert torch.equal(permutation[permuted], plain)


def test_a_row_without_others_is_chosen():
    assert select(Typicality(), torch.tensor([[1.0, 0.0]]), 1).tolist() == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "lightly2"}, r"rule must be one of \('product', .*got 'lightly2'"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"max_clusters": 0}, "max_clusters must be at least 1, got 0"),
        ({"distance_strength": -1.0}, "distance_strength must be finite and at least 0, got -1.0"),
        ({"typicality_strength": float("nan")}, "typicality_strength must be finite and at least 0, got nan"),
    ],
)
def test_fields_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Typicality(**fields)
