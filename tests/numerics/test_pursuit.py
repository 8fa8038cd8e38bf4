"""Matching pursuit against enumeration, and what it does with rows that repeat or point away."""

from __future__ import annotations

import itertools

import pytest
import torch

from curation.numerics.pursuit import matching_pursuit


def pursue(rows: torch.Tensor, target: torch.Tensor, num_rows: int, **fields: float) -> torch.Tensor:
    return matching_pursuit(rows @ rows.T, rows @ target, num_rows=num_rows, **fields)


def test_orthogonal_rows_give_the_targets_coordinates() -> None:
    weights = pursue(torch.eye(4, dtype=torch.float64), torch.tensor([3.0, 0.0, 1.0, 2.0], dtype=torch.float64), 2)
    assert weights.tolist() == pytest.approx([3.0, 0.0, 0.0, 2.0])


def test_the_weights_are_the_least_squares_fit_of_their_support() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(6, 12, generator=generator, dtype=torch.float64)
    target = rows.mean(dim=0)
    weights = pursue(rows, target, 3)
    support = weights.nonzero().flatten()
    best = torch.linalg.lstsq(rows[support].T, target[:, None]).solution[:, 0]
    torch.testing.assert_close(weights[support], best)
    errors = [
        (target - rows[list(some)].T @ torch.linalg.lstsq(rows[list(some)].T, target[:, None]).solution[:, 0]).norm()
        for some in itertools.combinations(range(6), 3)
    ]
    mine = (target - weights @ rows).norm()
    # Greedy, so not always the best of all sets, but better than most.
    assert sum(bool(mine <= error + 1e-12) for error in errors) > len(errors) / 2


def test_no_weight_is_negative_and_what_points_away_is_never_taken() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.9, 0.1]], dtype=torch.float64)
    weights = pursue(rows, torch.tensor([1.0, 0.0], dtype=torch.float64), 3)
    assert (weights >= 0).all() and weights[1] == 0 and weights[0] == pytest.approx(1.0)


def test_rows_that_repeat_are_no_trouble_and_a_ridge_shares_the_load() -> None:
    rows = torch.ones(3, 2, dtype=torch.float64)
    assert (pursue(rows, rows[0], 3) @ rows).tolist() == pytest.approx([1.0, 1.0])
    assert pursue(rows, rows[0], 3, ridge=1.0).count_nonzero() == 3


def test_nothing_is_taken_of_a_target_that_is_nought_and_shapes_are_checked() -> None:
    assert pursue(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 2).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"gram must be \(3, 3\), got \(2, 2\)"):
        matching_pursuit(torch.eye(2), torch.ones(3), num_rows=1)
