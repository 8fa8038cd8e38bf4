"""The schedule by hand at its corners, and its bounds everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.training.schedules import one_cycle, rate_factor, step_decay, warmup_cosine


def test_warm_up_is_linear_then_half_a_cosine_then_a_linear_cooldown() -> None:
    shape = {"warmup": 0.2, "cooldown": 0.2, "floor": 0.1}
    assert warmup_cosine(0.0, **shape) == 0.0
    assert warmup_cosine(0.1, **shape) == pytest.approx(0.5)
    assert warmup_cosine(0.2, **shape) == pytest.approx(1.0)
    assert warmup_cosine(0.5, **shape) == pytest.approx(0.55)
    assert warmup_cosine(0.8, **shape) == pytest.approx(0.1)
    assert warmup_cosine(0.9, **shape) == pytest.approx(0.05)
    assert warmup_cosine(1.0, **shape) == pytest.approx(0.0)


def test_without_warm_up_it_starts_at_one() -> None:
    assert warmup_cosine(0.0, warmup=0.0) == 1.0


@given(progress=st.floats(0, 1), warmup=st.floats(0, 0.5), cooldown=st.floats(0, 0.5), floor=st.floats(0, 1))
def test_the_factor_lies_between_0_and_1(progress: float, warmup: float, cooldown: float, floor: float) -> None:
    assert -1e-9 <= warmup_cosine(progress, warmup=warmup, cooldown=cooldown, floor=floor) <= 1 + 1e-9


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        warmup_cosine(1.5)
    with pytest.raises(ValueError, match="sum to at most 1"):
        warmup_cosine(0.5, warmup=0.6, cooldown=0.6)


def test_the_rate_falls_to_a_tenth_at_a_half_and_to_a_hundredth_at_three_quarters() -> None:
    assert [step_decay(at) for at in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_one_cycle_rises_from_a_25th_and_falls_to_almost_nothing() -> None:
    assert one_cycle(0.0) == pytest.approx(1 / 25) and one_cycle(0.3) == pytest.approx(1.0)
    assert one_cycle(0.15) == pytest.approx((1 + 1 / 25) / 2) and one_cycle(1.0) == pytest.approx(4e-6)


@pytest.mark.parametrize("schedule", [step_decay, one_cycle])
def test_a_progress_beyond_the_run_is_refused(schedule: Callable[[float], float]) -> None:
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.1"):
        schedule(1.1)


def test_a_schedule_is_known_by_its_name() -> None:
    assert rate_factor("cosine", 0.1, warmup=0.2) == pytest.approx(0.5)
    assert [rate_factor("step", at, warmup=0.2) for at in (0.1, 0.6, 0.9)] == [1.0, 0.1, 0.01]
    assert rate_factor("one-cycle", 0.15) == pytest.approx(0.52)
