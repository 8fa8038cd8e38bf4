"""Usage over the rounds, and the share of wrong labels in each round, by method: the study's plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure

SHOWN = ("dynamic", "dynamic, no penalty", "rs2", "infobatch", "rcap", "loss-greedy", "ucb")
PANELS = {
    "usage_max": "most and least used row",
    "usage_gini": "Gini of usage",
    "wrong_share_each_round": "share of wrong labels",
}


def draw_usage(parts: Sequence[dict[str, Any]], *, file: IO[bytes]) -> None:
    """Means over seeds, against the share of the run that is done: rounds differ in length between methods."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        for number, arm in enumerate(SHOWN):
            done, values = _mean([part["arms"][arm][name] for part in parts])
            panel.plot(done, values, color=f"C{number}", label=arm)
            if name == "usage_max":
                panel.plot(*_mean([part["arms"][arm]["usage_min"] for part in parts]), color=f"C{number}")
        panel.set_title(title)
        panel.set_xlabel("share of the run")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    first = parts[0]
    figure.suptitle(
        f"{first['set']}, 20% symmetric noise, keep {first['keep']}, {len(parts)} seeds; "
        "dynamic: our completion of 2603.04981"
    )
    figure.savefig(file, format="png", dpi=110)


def _mean(series: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Series of different lengths over the same run: their mean at 40 moments."""
    done = np.linspace(0, 1, 41)[1:]
    return done, np.mean([np.interp(done, np.linspace(0, 1, len(s) + 1)[1:], s) for s in series], axis=0)
