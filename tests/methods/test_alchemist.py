"""Shift-Gsample draws each decile of the rating as often as its specification says, and its neighbours do theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator

from curation.methods.alchemist import Alchemist, gumbel_of, published_head_cut, shift_gsample
from curation.numerics.percentiles import inclusion
from curation.recipe import Select

N = 200_000
DECILES = {
    (0.2, 0.25, None): [0, 0, 0.01, 0.08, 0.27, 0.50, 0.56, 0.40, 0.16, 0.03],
    (0.5, 0.25, None): [0, 0, 0.05, 0.38, 0.84, 0.98, 0.99, 0.95, 0.63, 0.18],
    (0.5, 0.25, 0.25): [0, 0, 0.23, 0.58, 0.71, 0.79, 0.80, 0.76, 0.65, 0.49],
    (0.8, 0.15, None): [0, 0.31, 0.95, 1, 1, 1, 1, 1, 1, 0.75],
    (0.9, 0.05, None): [0.31, 0.94, 1, 1, 1, 1, 1, 1, 0.99, 0.76],
}
"""(keep fraction, head cut, spread) -> inclusion by decile of the rating, highest first: alchemist.md, Sec. 4.4."""


def rows_of(percentile: np.ndarray, *, uid_seed: int = 0) -> dict[str, torch.Tensor]:
    uid = np.random.default_rng(uid_seed).integers(-(2**62), 2**62, (len(percentile), 2))
    return {"rating_percentile": torch.from_numpy(percentile.astype(np.float32)), "uid": torch.from_numpy(uid)}


def chosen(selector: Alchemist, percentile: np.ndarray, keep: int, *, seed: int = 0) -> np.ndarray:
    return selector.select(rows_of(percentile), keep, 0.0, Generator().manual_seed(seed)).indices.numpy()


def kept_by_decile(percentile: np.ndarray, indices: np.ndarray) -> np.ndarray:
    is_kept = np.zeros(len(percentile), bool)
    is_kept[indices] = True
    return inclusion(percentile, is_kept)


@pytest.mark.parametrize("setting", DECILES, ids=str)
def test_each_decile_is_drawn_as_often_as_the_specification_says(setting):
    keep, head_cut, spread = setting
    percentile = (np.arange(N) + 0.5) / N
    indices = chosen(Alchemist(head_cut=head_cut, spread=spread), percentile, round(keep * N))
    # The table is one draw in two digits: its 0.56 is 0.553 by integration, and a decile's deviation is 0.0035.
    np.testing.assert_allclose(kept_by_decile(percentile, indices), DECILES[setting], atol=0.016)
    if setting == (0.2, 0.25, None):
        assert percentile[indices].mean() == pytest.approx(0.625, abs=0.005)


def test_a_plain_gaussian_has_no_shift():
    percentile = (np.arange(N) + 0.5) / N
    found = kept_by_decile(percentile, chosen(Alchemist(rule="gaussian"), percentile, N // 5))
    np.testing.assert_allclose(found, [0.02, 0.06, 0.18, 0.32, 0.42, 0.43, 0.32, 0.17, 0.07, 0.02], atol=0.016)


def test_ratings_in_memory_take_the_published_head_cut_and_refuse_what_it_does_not_leave():
    rating = np.random.default_rng(1).normal(size=20_000)
    kept = shift_gsample(rating, 0.8, seed=0)
    percentile = np.argsort(np.argsort(-rating)) / len(rating)
    assert percentile[kept].min() >= 0.15 and len(kept) == 16_000
    assert [published_head_cut(share) for share in (0.1, 0.5, 0.51, 0.8, 0.81)] == [0.25, 0.25, 0.15, 0.15, 0.05]
    with pytest.raises(ValueError, match=r"keep_fraction must be at most 0\.95, 1 - head_cut, got 0\.96"):
        shift_gsample(rating, 0.96, seed=0)


def test_four_rows_are_drawn_first_with_the_gaussians_probability():
    percentile = np.array([0.3, 0.5, 0.625, 0.9], np.float32)
    weights = np.exp(-((percentile - 0.625) ** 2) / (2 * 0.125**2))
    selector, rows, draws = Alchemist(), rows_of(percentile), 6_000
    first = [int(selector.sort_key(rows, 0.0, seed).argmax()) for seed in range(draws)]
    shares = np.bincount(first, minlength=4) / draws
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.02)  # three standard deviations


def test_the_variants_take_what_their_names_say():
    percentile = (np.random.default_rng(2).permutation(1000) + 0.5) / 1000
    assert percentile[chosen(Alchemist(rule="top"), percentile, 100)].max() == pytest.approx(0.0995)
    block = percentile[chosen(Alchemist(rule="block", block_start=0.6), percentile, 150)]
    assert block.min() > 0.6 and block.max() < 0.8 and block.std() > 0.04
    evenly = kept_by_decile(percentile, chosen(Alchemist(rule="random"), percentile, 500))
    assert evenly.min() > 0.3 and evenly.max() < 0.7


def test_the_cut_head_comes_last_and_a_row_without_a_rating_after_it():
    percentile = np.array([0.1, np.nan, 0.5, 0.7, 0.2])
    order = chosen(Alchemist(), percentile, 5).tolist()
    assert set(order[:2]) == {2, 3} and set(order[2:4]) == {0, 4} and order[4] == 1


def test_noise_is_gumbel_and_a_hash_of_uid_and_seed():
    uid = rows_of(np.zeros(100_000))["uid"]
    noise = gumbel_of(uid, 5)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(np.pi**2 / 6, abs=0.04)
    assert torch.equal(gumbel_of(uid[7:9], 5), noise[7:9]) and not torch.equal(gumbel_of(uid, 6), noise)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"head_cut": 1.0}, r"head_cut must be in \[0, 1\), got 1\.0"),
        ({"spread": 0.0}, r"spread must be at least 0\.001, got 0\.0"),
        ({"block_start": 0.9}, r"a block must lie in \[0, 1\], got 0\.9 and width 0\.2"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Alchemist(**fields)


def test_a_recipe_does_not_keep_more_than_the_head_cut_leaves():
    assert Select(method={"name": "alchemist"}, keep_fraction=0.75).keep_fraction == 0.75
    with pytest.raises(ValueError, match=r"method 'alchemist' keeps at most 0\.75 of the rows, got 0\.8"):
        Select(method={"name": "alchemist"}, keep_fraction=0.8)
    with pytest.raises(ValueError, match=r"keeps at most 0\.2 of the rows"):
        Select(method={"name": "alchemist", "rule": "block"}, keep_fraction=0.3)
