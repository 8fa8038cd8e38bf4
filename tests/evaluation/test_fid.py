from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from curation.evaluation.fid import Moments, distance_of_moments, frechet_distance, frechet_infinity, moments


def features(seed: int, n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )


def gaussian(mean: list[float], covariance: list[list[float]]) -> Moments:
    return Moments(2, torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


@pytest.mark.parametrize(("n", "d"), [(500, 8), (200, 64), (40, 100)])
def test_a_set_has_no_distance_to_itself_and_a_shifted_copy_that_of_the_shift(n: int, d: int) -> None:
    x = features(0, n, d)
    shift = torch.arange(d).double() / d
    assert abs(frechet_distance(x, x)) < 1e-6
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), abs=1e-6)


def test_of_normals_of_one_dimension_it_is_what_the_closed_form_says() -> None:
    assert distance_of_moments(gaussian([0], [[1]]), gaussian([1], [[4]])) == pytest.approx(2, abs=1e-12)


def test_of_covariances_that_commute_it_is_the_distance_of_the_standard_deviations() -> None:
    a, b = gaussian([0, 0], [[1, 0], [0, 9]]), gaussian([3, 4], [[4, 0], [0, 1]])
    assert distance_of_moments(a, b) == pytest.approx(25 + (1 - 2) ** 2 + (3 - 1) ** 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_it_is_symmetric_and_what_torchmetrics_makes_of_the_eigenvalues_of_the_product(seed: int) -> None:
    x, y = features(seed, 60, 5), features(seed + 1, 60, 5) + 1
    a, b = moments(x), moments(y)
    theirs = _compute_fid(a.mean_D, a.covariance(), b.mean_D, b.covariance()).item()
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize("block_rows", [1, 7, 100, 1000])
def test_moments_of_blocks_are_those_of_the_whole_even_far_from_the_origin(block_rows: int) -> None:
    x = features(3, 100, 6) + 1e6
    whole = moments(x, block_rows=block_rows)
    assert whole.count == 100
    np.testing.assert_allclose(whole.mean_D.numpy(), x.mean(dim=0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance().numpy(), np.cov(x.numpy().T), rtol=1e-6)


def test_moments_of_parts_merge_in_any_order_and_nothing_adds_nothing() -> None:
    x = features(4, 90, 3)
    parts = [moments(x[:20]), moments(x[20:21]), moments(x[21:])]
    forward, backward = parts[0].merged(parts[1]).merged(parts[2]), parts[2].merged(parts[1]).merged(parts[0])
    torch.testing.assert_close(forward.scatter_DD, backward.scatter_DD)
    torch.testing.assert_close(forward.scatter_DD, moments(x).scatter_DD)
    nothing = moments(x[:0])
    assert nothing.merged(nothing).count == 0
    torch.testing.assert_close(nothing.merged(parts[0]).scatter_DD, parts[0].scatter_DD)


def test_half_precision_features_are_summed_in_double() -> None:
    x = features(5, 5000, 2).half()
    torch.testing.assert_close(moments(x).mean_D, x.double().mean(dim=0), rtol=1e-14, atol=0)


def test_infinity_takes_the_bias_of_few_rows_away() -> None:
    # Both sets are of one normal, so the true distance is 0; what is left of it at n rows is bias.
    reference = moments(torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(1_000, 16, generator=torch.Generator().manual_seed(1))
    found = frechet_infinity(x, reference, seed=0)
    assert found.sizes[0] == 500 and found.sizes[-1] == 1_000 and len(found.distances) == 15
    assert found.distances[0] > found.distances[-1] > 0.05
    assert abs(found.distance) < 0.3 * found.distances[-1]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="sets must be of one size, their bias depends on it, got 3 and 4"):
        frechet_distance(features(0, 3, 2), features(0, 4, 2))
    with pytest.raises(ValueError, match="a covariance needs two rows, got 1"):
        frechet_distance(features(0, 1, 2), features(0, 1, 2))
    with pytest.raises(ValueError, match="features must be of one width, got 2 and 3"):
        frechet_distance(features(0, 4, 2), features(0, 4, 3))
    with pytest.raises(ValueError, match="features must be of one width, got 2 and 3"):
        moments(features(0, 4, 2)).merged(moments(features(0, 4, 3)))
    with pytest.raises(ValueError, match=r"features must be floats \(N, D\), got torch.int64 \(3, 2\)"):
        moments(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="features must be finite, a row of 2 to 3 is not"):
        moments(torch.tensor([[0.0], [1.0], [2.0], [torch.nan]]), block_rows=2)
    with pytest.raises(ValueError, match="block_rows must be at least 1, got 0"):
        moments(features(0, 4, 2), block_rows=0)
    with pytest.raises(ValueError, match="points must be at least 2, and the rows enough"):
        frechet_infinity(features(0, 9, 2), moments(features(0, 9, 2)), seed=0)
