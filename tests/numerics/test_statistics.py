import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.numerics.statistics import dithered

LARGEST = float(np.finfo(np.float32).max)


@settings(deadline=None)
@given(
    value=st.floats(-LARGEST / 2, LARGEST / 2).filter(lambda value: value == 0 or abs(value) > 1e-37),
    tick=st.integers(0, 2**32 - 1),
    key=st.integers(0, 2**63 - 1),
)
def test_a_dithered_number_is_one_of_the_two_nearest_float32(value, tick, key):
    (rounded,) = dithered(np.array([value]), tick=np.array([tick], np.uint32), keys=np.array([key]))
    toward_zero = np.float32(value)
    if abs(float(toward_zero)) > abs(value):
        toward_zero = np.nextafter(toward_zero, np.float32(0))
    away = np.nextafter(toward_zero, np.float32(np.copysign(np.inf, value)))
    assert rounded in ([toward_zero] if float(toward_zero) == value else [toward_zero, away])


def test_a_float32_stays_as_it_is():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    values[:4] = LARGEST, -LARGEST, 0, 1e-45
    rows = np.arange(1000)
    assert (dithered(values.astype(np.float64), tick=rows.astype(np.uint32), keys=rows) == values).all()


def test_rounding_is_right_on_average_over_ticks_and_over_keys():
    unit = 2.0**-23
    for share in (0.01, 0.25, 0.5, 0.9):
        values, rows = np.full(4000, 1 + share * unit), np.arange(4000)
        for tick, keys in ((rows, np.zeros(4000)), (np.zeros(4000), rows)):
            rounded = dithered(values, tick=tick.astype(np.uint32), keys=keys.astype(np.int64))
            went_up = (rounded.astype(np.float64) - 1).mean() / unit
            assert abs(went_up - share) < 0.003  # random numbers would miss it by 0.008


def test_errors_of_successive_ticks_cancel():
    unit, ticks = 2.0**-23, np.arange(10_000)
    rounded = dithered(np.full(10_000, 1 + 0.3 * unit), tick=ticks.astype(np.uint32), keys=np.zeros(10_000, np.int64))
    errors = np.cumsum(rounded.astype(np.float64) - 1 - 0.3 * unit) / unit
    assert np.abs(errors).max() < 4  # a random walk would be at 46
