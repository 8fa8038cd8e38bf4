import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.numerics.quantiles import count_bits, from_ordered_bits, gini, ordered_bits, quantiles_from_counts

floats = st.sampled_from([0.0, -0.0, 0.25, -1.0, 1e-45, -1e-45]) | st.floats(
    width=32, allow_nan=False, allow_infinity=False
)
rows = st.lists(floats, max_size=30).map(lambda values: np.array(values, dtype=np.float32))


@settings(deadline=None)
@given(a=floats, b=floats)
def test_ordered_bits_keep_the_order_and_give_the_values_back(a, b):
    values = np.array([a, b], dtype=np.float32)
    bits = ordered_bits(values)
    assert (bits[0] < bits[1]) == (values[0] < values[1])
    assert (bits[0] == bits[1]) == (values[0] == values[1])
    assert from_ordered_bits(bits).tolist() == values.tolist()


@settings(deadline=None)
@given(parts=st.lists(rows, max_size=4), q=st.lists(st.floats(0, 1), max_size=6))
def test_quantiles_of_summed_counts_are_numpys_of_all_values(parts, q):
    def counts_of(prefix):
        return sum((count_bits(part, prefix=prefix) for part in parts), np.zeros(65536, np.int64))

    values = np.concatenate([np.zeros(0, np.float32), *parts])
    shares = np.array([0.0, 1.0, *q])
    found = quantiles_from_counts(counts_of, shares)
    if len(values):
        assert found.tolist() == np.quantile(values, shares, method="inverted_cdf").tolist()
    else:
        assert np.isnan(found).all()
    assert found.dtype == np.float32


def test_quantiles_of_many_values_take_one_pass_per_bin_that_holds_one():
    values, asked = np.random.default_rng(0).normal(size=100_000).astype(np.float32), []

    def counts_of(prefix):
        asked.append(prefix)
        return count_bits(values, prefix=prefix)

    shares = np.linspace(0, 1, 11)
    found = quantiles_from_counts(counts_of, shares)
    assert found.tolist() == np.quantile(values, shares, method="inverted_cdf").tolist()
    assert asked[0] is None
    assert len(asked) == len(set(asked)) <= 12


@pytest.mark.parametrize("q", [[-0.1], [1.1], [np.nan], [[0.5]]])
def test_a_q_that_is_no_share_is_refused(q):
    with pytest.raises(ValueError, match=r"q must be a row of numbers in \[0, 1\], got"):
        quantiles_from_counts(lambda prefix: np.ones(65536, np.int64), q)


def test_values_that_changed_between_the_passes_are_noticed():
    def counts_of(prefix):
        return count_bits(np.ones(3 if prefix is None else 2, np.float32), prefix=prefix)

    with pytest.raises(RuntimeError, match="the values changed between passes: 3 in bin 49024 became 2"):
        quantiles_from_counts(counts_of, [0.5])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_gini_is_half_the_mean_difference_over_the_mean(usage):
    x = np.array(usage, dtype=np.float64)
    by_definition = np.abs(x[:, None] - x).mean() / (2 * x.mean()) if x.any() else 0.0
    assert gini(np.bincount(usage)) == pytest.approx(by_definition, abs=1e-12)
    assert gini(np.bincount(usage, minlength=65536)) == pytest.approx(by_definition, abs=1e-12)


@pytest.mark.parametrize(
    ("histogram", "value"),
    [([], 0), ([0, 0], 0), ([7], 0), ([0, 0, 7], 0), ([1, 1], 0.5), ([9, 0, 0, 1], 0.9)],
)
def test_gini_by_hand(histogram, value):
    assert gini(np.array(histogram, dtype=np.int64)) == pytest.approx(value)


def test_gini_of_a_billion_samples_does_not_overflow():
    histogram = np.zeros(65536, dtype=np.int64)
    histogram[[0, 65535]] = 5 * 10**9
    assert gini(histogram) == pytest.approx(0.5)


@pytest.mark.parametrize("histogram", [np.array([1.0]), np.array([-1]), np.ones((2, 2), np.int64)])
def test_gini_of_what_are_no_counts_is_refused(histogram):
    with pytest.raises(ValueError, match=r"usage_histogram must be counts \(m,\), got"):
        gini(histogram)
