import pytest

from curation.numerics.intervals import t_95, t_interval, wilson


def test_three_seeds_have_the_interval_of_the_textbook():
    mean, half = t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert t_interval([7.0]) == (7.0, None)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (9, 2.262), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_95(degrees) == pytest.approx(quantile, abs=1e-3)


def test_wilson_is_that_of_the_tables_and_holds_the_share():
    # Brown, Cai, DasGupta 2001: 0 of 10 and 5 of 10.
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_what_has_no_interval_is_refused():
    with pytest.raises(ValueError, match="needs a value, got none"):
        t_interval([])
    with pytest.raises(ValueError, match="degrees must be at least 1, got 0"):
        t_95(0)
    with pytest.raises(ValueError, match=r"successes must be in \[0, 3\], got 4"):
        wilson(4, 3)
