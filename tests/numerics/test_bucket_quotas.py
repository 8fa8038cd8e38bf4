from __future__ import annotations

import numpy as np
import pytest

from curation.numerics.bucket_quotas import bucket_quotas


@pytest.mark.parametrize(
    ("sizes", "keep", "rule", "expected"),
    [
        ([10, 20, 30], 6, "proportional", [1, 2, 3]),
        ([10, 10, 10], 4, "proportional", [2, 1, 1]),
        ([1, 5, 6], 4, "proportional", [0, 2, 2]),  # 0.33, 1.67, 2
        ([10, 20, 30], 6, "even", [2, 2, 2]),
        ([1, 20, 30], 8, "even", [1, 4, 3]),
        ([0, 1, 2, 9], 9, "even", [0, 1, 2, 6]),
        ([4, 0, 4], 0, "even", [0, 0, 0]),
        ([4, 0, 4], 8, "proportional", [4, 0, 4]),
        ([4, 0, 4], 8, "even", [4, 0, 4]),
    ],
)
def test_by_hand(sizes, keep, rule, expected):
    assert bucket_quotas(np.array(sizes), keep=keep, rule=rule).tolist() == expected


@pytest.mark.parametrize("rule", ["proportional", "even"])
def test_they_add_up_and_no_bucket_gives_more_than_it_has(rule):
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 50, rng.integers(1, 20))
        keep = int(rng.integers(0, sizes.sum() + 1))
        given = bucket_quotas(sizes, keep=keep, rule=rule)
        assert given.sum() == keep
        assert ((given >= 0) & (given <= sizes)).all()


def test_pools_of_billions_do_not_overflow():
    assert bucket_quotas(np.array([3 * 10**9, 10**9]), keep=2 * 10**9, rule="proportional").tolist() == [
        15 * 10**8,
        5 * 10**8,
    ]


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"keep must be in \[0, 3\], got 4"):
        bucket_quotas(np.array([1, 2]), keep=4, rule="even")
