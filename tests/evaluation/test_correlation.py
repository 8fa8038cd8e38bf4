import numpy as np
import pytest

from curation.evaluation.correlation import over_seeds, ranks, spearman, spearman_matrix


def test_equal_values_share_the_mean_of_their_ranks():
    np.testing.assert_array_equal(ranks(np.array([5.0, 1.0, 5.0, 3.0])), [3.5, 1.0, 3.5, 2.0])


def test_spearman_by_hand():
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)); d = (0, 1, -1, 0).
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 99.0])) == pytest.approx(1 - 12 / 60)


def test_only_the_order_counts_and_rows_without_a_value_are_left_out():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    with_gaps = np.concatenate([a, [np.nan, 1.0, np.inf]]), np.concatenate([np.exp(b), [1.0, np.nan, 2.0]])
    assert spearman(*with_gaps) == pytest.approx(spearman(a, b))
    assert spearman(a, -a) == pytest.approx(-1.0)


@pytest.mark.parametrize(("a", "b"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [1.0, 2.0])])
def test_constant_or_too_few_rows_have_no_correlation(a, b):
    assert np.isnan(spearman(np.array(a), np.array(b)))


def test_the_matrix_is_symmetric_with_ones_on_its_diagonal():
    rng = np.random.default_rng(1)
    scores = {name: rng.normal(size=30) for name in "abc"}
    matrix = spearman_matrix(scores)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    assert matrix[0, 2] == spearman(scores["a"], scores["c"])


def test_over_seeds_each_pair_has_its_mean_and_interval():
    seeds = [np.array([[1.0, value], [value, np.nan]]) for value in (0.1, 0.2, 0.3)]
    found = over_seeds(seeds)
    assert found[0][0] == (1.0, 0.0) and found[1][1] is None
    cell = found[0][1]
    assert (
        cell is not None and cell.mean == pytest.approx(0.2) and cell.half_width == pytest.approx(4.303 * 0.1 / 3**0.5)
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one value per row each, got 2 and 3"):
        spearman(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="matrices must be of one shape"):
        over_seeds([np.zeros((2, 2)), np.zeros((3, 3))])
    with pytest.raises(ValueError, match="matrices must be of one shape"):
        over_seeds([])
