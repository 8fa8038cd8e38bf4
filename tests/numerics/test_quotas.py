"""Quotas are spread evenly, and a cut keeps exactly its quota."""

from __future__ import annotations

import numpy as np
import pytest

from curation.numerics.quotas import LAST_HASH, Window, capped, cut, even, window

COUNTS = {"a": 10, "b": 3, "c": 7, "d": 1}


def test_a_cap_is_the_quota_of_those_above_it() -> None:
    assert capped(COUNTS, 3) == {"a": 3, "c": 3}
    assert capped(COUNTS, 0) == {"a": 0, "b": 0, "c": 0, "d": 0}


@pytest.mark.parametrize("keep", range(22))
def test_an_even_spread_keeps_exactly_so_many_and_no_group_more_than_one_above_another_that_is_cut(keep: int) -> None:
    quotas = even(COUNTS, keep)
    kept = {group: quotas.get(group, rows) for group, rows in COUNTS.items()}
    assert sum(kept.values()) == min(keep, 21)
    for group in quotas:
        assert kept[group] < COUNTS[group] and kept[group] >= max(kept.values()) - 1


def test_what_is_left_over_goes_to_the_largest() -> None:
    assert even({"a": 5, "b": 9, "c": 9}, 7) == {"a": 2, "b": 3, "c": 2}


@pytest.mark.parametrize(("rows", "quota"), [(1000, 1), (1000, 500), (1000, 999), (50, 7), (2, 1)])
def test_the_cut_is_the_quota_th_smallest_hash(rows: int, quota: int) -> None:
    hashes = np.random.default_rng(rows).integers(0, LAST_HASH, rows, np.uint64, endpoint=True)
    where = window(rows, quota)
    inside = hashes[(hashes >= np.uint64(where.low)) & (hashes <= np.uint64(where.high))]
    found = cut(quota, where, below=int((hashes < np.uint64(where.low)).sum()), inside_M=inside)
    assert found == np.sort(hashes)[quota - 1]
    if rows == 1000:
        assert len(inside) < 250 or quota == 500


def test_a_window_grows_with_the_root_of_the_rows() -> None:
    where = window(10**8, 10**6)
    assert (where.high - where.low) / LAST_HASH * 10**8 < 13 * 10**3


def test_a_cut_outside_its_window_is_not_guessed() -> None:
    where, inside = Window(10, 20), np.array([15], np.uint64)
    assert cut(3, where, below=1, inside_M=inside) is None
    assert cut(3, where, below=4, inside_M=inside) is None
    assert cut(3, where, below=3, inside_M=inside) == 9  # all that is below, and nothing of the window
    assert window(10, 3, deviations=float("inf")) == Window(0, LAST_HASH)
