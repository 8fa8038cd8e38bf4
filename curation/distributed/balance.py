"""A balance step over a pool: exact quotas by group in two passes, in memory of the groups that are cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from curation.data.tallies import GroupCounts, HashWindows, Label, WithinQuota
from curation.numerics import quotas
from curation.recipe import Balance

DEVIATIONS_BY_PASS = (quotas.DEVIATIONS, 50.0, float("inf"))
Tally = Callable[[Any], Any]


def within_quotas(step: Balance, seed: int, tally: Tally) -> WithinQuota:
    """The test that keeps exactly the quota of each group. `tally` counts over the rows that reach the step."""
    label = Label(step.balance, step.edges)
    counted: Mapping[str | None, np.ndarray] = tally(GroupCounts(label)) or {}
    rows = {group: int(counts[-1]) for group, counts in counted.items() if group is not None and counts[-1]}
    wanted = _quotas(step, rows)
    cuts = _cuts(label, seed, wanted, rows, tally)
    if step.quotas is not None and step.others == "drop":  # a group that is not full has no cut, and is kept whole
        cuts |= {group: quotas.LAST_HASH for group in step.quotas if group not in cuts}
    keep_others = step.quotas is None or step.others == "keep"
    return WithinQuota(step.name, label, cuts, seed, keep_others=keep_others, keep_nulls=step.nulls == "keep")


def _quotas(step: Balance, rows: Mapping[str, int]) -> dict[str, int]:
    """Quotas of the groups that hold more rows than theirs."""
    if step.cap is not None:
        return quotas.capped(rows, step.cap)
    if step.keep is not None:
        return quotas.even(rows, step.keep)
    return {group: quota for group, quota in (step.quotas or {}).items() if rows.get(group, 0) > quota}


def _cuts(label: Label, seed: int, wanted: Mapping[str, int], rows: Mapping[str, int], tally: Tally) -> dict[str, int]:
    cuts = {group: -1 for group, quota in wanted.items() if quota == 0}
    for deviations in DEVIATIONS_BY_PASS:
        windows = {
            group: quotas.window(rows[group], quota, deviations=deviations)
            for group, quota in wanted.items()
            if group not in cuts
        }
        if not windows:
            break
        for group, (below, inside) in tally(HashWindows(label, windows, seed)).items():
            cut = quotas.cut(wanted[group], windows[group], below=below, inside_M=inside)
            if cut is not None:
                cuts[group] = cut
    assert cuts.keys() == wanted.keys()
    return cuts
