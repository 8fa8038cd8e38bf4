"""Learning-rate schedules: pure functions of the progress, so a resumed run needs no schedule state."""

from __future__ import annotations

import math


def warmup_cosine(progress: float, *, warmup: float = 0.05, cooldown: float = 0.0, floor: float = 0.0) -> float:
    """Factor on the learning rate, in [0, 1], at `progress` 0 to 1.

    Linear from 0 to 1 over the first `warmup`; half a cosine from 1 to `floor`; linear from `floor` to 0 over the last
    `cooldown`. SGDR, Loshchilov and Hutter 2016 (arXiv:1608.03983), Eq. 5, without restarts.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
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
