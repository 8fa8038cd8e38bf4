"""Learning-rate schedules: pure functions of the progress, so a resumed run needs no schedule state.

Progress is the share of the run's samples that were seen, so a schedule ends with the budget however long or short its
rounds are. (torch.optim.lr_scheduler counts its own calls, and a OneCycleLR that is made anew each round jumps.)
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

RateSchedule = Literal["cosine", "step", "one-cycle"]


def rate_factor(
    schedule: RateSchedule, progress: float, *, warmup: float = 0.05, cooldown: float = 0.0, floor: float = 0.0
) -> float:
    """Factor on the learning rate at `progress` 0 to 1, by the schedule's name; the shape is that of the cosine."""
    if schedule == "cosine":
        return warmup_cosine(progress, warmup=warmup, cooldown=cooldown, floor=floor)
    if schedule == "step":
        return step_decay(progress)
    if schedule == "one-cycle":
        return one_cycle(progress)
    assert_never(schedule)


def warmup_cosine(progress: float, *, warmup: float = 0.05, cooldown: float = 0.0, floor: float = 0.0) -> float:
    """Factor on the learning rate, in [0, 1], at `progress` 0 to 1.

    Linear from 0 to 1 over the first `warmup`; half a cosine from 1 to `floor`; linear from `floor` to 0 over the last
    `cooldown`. SGDR, Loshchilov and Hutter 2016 (arXiv:1608.03983), Eq. 5, without restarts.
    """
    _check(progress)
    if warmup < 0 or cooldown < 0 or warmup + cooldown > 1 or not 0 <= floor <= 1:
        raise ValueError(
            "warmup and cooldown must be >= 0 and sum to at most 1, and floor must be in [0, 1], "
            f"got warmup={warmup}, cooldown={cooldown}, floor={floor}"
        )
    if progress < warmup:
        return progress / warmup
    if progress > 1 - cooldown:
        return floor * (1 - progress) / cooldown
    span = 1 - warmup - cooldown
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - warmup) / span)) / 2 if span > 0 else 1.0


def step_decay(progress: float) -> float:
    """Factor on the learning rate at `progress` 0 to 1: a tenth from one half of the run on, a hundredth from three
    quarters on. He et al. 2015 (arXiv:1512.03385), Sec. 4.2."""
    _check(progress)
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def one_cycle(progress: float, *, rise: float = 0.3, first: float = 1 / 25, last: float = 1e-4) -> float:
    """Factor on the learning rate at `progress` 0 to 1: half a cosine from `first` up to 1 over `rise` of the run, then
    half a cosine down to `first` * `last`. Smith and Topin 2017 (arXiv:1708.07120), with torch's defaults."""
    _check(progress)
    begin, end, part = (
        (first, 1.0, progress / rise) if progress < rise else (1.0, first * last, (progress - rise) / (1 - rise))
    )
    return end + (begin - end) * (1 + math.cos(math.pi * part)) / 2


def _check(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
