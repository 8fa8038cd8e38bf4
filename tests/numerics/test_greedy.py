from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from curation.numerics import greedy
from curation.numerics.greedy import greedy_by_distance, greedy_by_spacing, k_center
from curation.numerics.neighbors import nearest_distances, squared_distances


def unit(n, width=8, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive_k_center(rows, keep, first):
    """Gonzalez's rule from the whole matrix of distances, in double precision."""
    distances = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = [first]
    while len(chosen) < keep:
        nearest = distances[chosen].min(dim=0).values
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def test_the_spec_s_k_centre_example():
    assert k_center(torch.tensor([[1.0], [3.0], [5.0]]), keep=2, first=0).tolist() == [0, 2]


def test_it_is_the_naive_rule():
    rows = unit(300)
    assert k_center(rows, keep=120, first=17).tolist() == naive_k_center(rows, 120, 17)


@pytest.mark.parametrize(("made", "kept"), [(1, 1), (5, 5), (300, 300)])
def test_how_many_columns_are_made_ahead_changes_nothing(monkeypatch, made, kept):
    rows = unit(200, seed=3)
    expected = k_center(rows, keep=80, first=0)
    monkeypatch.setattr(greedy, "COLUMNS_AHEAD", made)
    monkeypatch.setattr(greedy, "COLUMNS_KEPT", kept)
    found = greedy_by_distance(rows, keep=80, first=0, scores=lambda nearest2, _: nearest2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("candidates", [1, 2, 9, 64, 1000])
@pytest.mark.parametrize("weighed", [False, True])
def test_how_many_rows_are_candidates_changes_nothing(monkeypatch, candidates, weighed):
    rows = torch.cat([unit(150, seed=4), unit(150, seed=4)[:50], 0.05 * unit(60, seed=5)])  # with copies, and a clump
    weight = torch.rand(260, generator=torch.Generator().manual_seed(6)) + 0.1 if weighed else torch.ones(260)
    expected = greedy_by_distance(rows, keep=200, first=3, scores=lambda nearest2, _: nearest2 * weight)
    monkeypatch.setattr(greedy, "CANDIDATES", candidates)
    monkeypatch.setattr(greedy, "COLUMNS_AT_ONCE", 3)
    found = greedy_by_spacing(rows, keep=200, first=3, score=lambda nearest2, places: nearest2 * weight[places])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_more_rows_that_score_alike_than_candidates_are_parted_by_place(monkeypatch, candidates):
    monkeypatch.setattr(greedy, "CANDIDATES", candidates)
    assert k_center(torch.zeros(7, 2), keep=6, first=3).tolist() == [3, 0, 1, 2, 4, 5]


def test_copies_come_after_every_other_row():
    rows = torch.cat([unit(50), unit(50)])
    chosen = k_center(rows, keep=100, first=0)
    assert sorted(chosen[:50].remainder(50).tolist()) == list(range(50))
    assert sorted(chosen.tolist()) == list(range(100))


def test_equal_scores_are_parted_by_place():
    assert k_center(torch.zeros(4, 2), keep=4, first=2).tolist() == [2, 0, 1, 3]


def test_scores_hear_of_the_nearest_other_chosen_row():
    heard = []

    def scores(nearest2, chosen):
        heard.append((nearest2[chosen].tolist(), list(chosen)))
        return nearest2

    greedy_by_distance(torch.tensor([[0.0], [3.0], [10.0], [11.0]]), keep=4, first=0, scores=scores)
    assert heard == [([torch.inf], [0]), ([121.0, 121.0], [0, 3]), ([9.0, 64.0, 9.0], [0, 3, 1])]


def test_none_may_be_kept_and_no_more_than_there_are():
    assert k_center(unit(3), keep=0, first=0).tolist() == []
    with pytest.raises(ValueError, match=r"keep must be in \[0, 3\], got 4"):
        k_center(unit(3), keep=4, first=0)
    with pytest.raises(ValueError, match=r"first must be in \[0, 3\), got 3"):
        k_center(unit(3), keep=1, first=3)


def test_distances_are_right_where_the_product_form_cancels():
    rows = unit(40, width=64).repeat(2, 1)
    rows[40:] += 1e-5
    norms2 = rows.square().sum(dim=1)
    found = squared_distances(rows, torch.arange(80), norms2)
    expected = (rows[:, None].double() - rows[None].double()).square().sum(dim=2)
    torch.testing.assert_close(found.double(), expected, rtol=5e-4, atol=1e-12)


def test_nearest_distances_are_those_of_the_whole_matrix_whatever_the_block():
    rows = unit(90, width=5)
    whole = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = whole.fill_diagonal_(torch.inf).sort(dim=1).values[:, :7]
    for block_rows in (1, 32, 1000):
        torch.testing.assert_close(
            nearest_distances(rows, 7, block_rows=block_rows).double(), expected, rtol=1e-4, atol=1e-6
        )


def test_a_copy_is_a_neighbour_at_distance_zero_and_a_row_is_none_of_its_own():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(nearest_distances(rows, 2), torch.tensor([[0, 2**0.5], [0, 2**0.5], [2**0.5, 2**0.5]]))
    with pytest.raises(ValueError, match=r"num_neighbors must be in \[1, 2\], the other rows, got 3"):
        nearest_distances(rows, 3)
