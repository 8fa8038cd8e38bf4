"""Dynamic selection: representative rows first, rare ones later, and no row much more often than another.

Source: "Rethinking Representativeness and Diversity in Dynamic Data Selection" (arXiv:2603.04981), of which the
abstract, the title page and excerpts are public. Its equations 2 to 11 are not: what is here is our completion of
2603.04981, and every figure made with it says so. Once a round all rows of the pool are ranked by

    s = (1 - lambda) R + lambda D - beta * usage

with R and D the ranks in [0, 1] of how well a row's factors cover the pool's frequent ones and how rare they are
(`jobs.fit factors`), lambda going from 0 to 1 over the run, and usage how often the row was trained on.

Law (count form, derived): if a row is chosen and another is not, the first was used at most 1 / beta times more often,
for R and D lie in [0, 1]; so the usage of no two rows ever differs by more than floor(1 / beta) + 1 (`usage_gap`).
With `temperature`, whose noise has no bound, and in the frequency form there is no such law.

Deviations from our own specification: the random tie-break is 2**-20 wide instead of 1e-9, because keys are float32;
what all rows were used alike is taken off the usage, which moves no row.

N rows; 2 words of a uid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from curation.methods._pool_order import select_by_sort_key, uid_column_words
from curation.numerics.sampling import hash_uniform
from curation.selector import Rows, Selection, check_needs

Schedule = Literal["cosine", "sigmoid", "linear", "constant", "reversed"]
TIE_BREAK = 2.0**-20
"""Width of the noise that parts rows of equal score, in ranks."""
SETTLED = 0.9
"""Share of the run after which the cosine has come to its end."""


def rarity_weight(progress: float, schedule: Schedule) -> float:
    """lambda in [0, 1] at `progress` 0 to 1: how much rarity counts against representativeness."""
    if schedule == "constant":
        return 0.5
    if schedule == "linear":
        return progress
    if schedule == "sigmoid":
        return 1 / (1 + math.exp(-(progress - 0.5) / 0.1))
    cosine = 0.5 * (1 - math.cos(math.pi * min(1.0, progress / SETTLED)))
    return 1 - cosine if schedule == "reversed" else cosine


def usage_gap(penalty: float) -> int:
    """What the usage of two rows can differ by at most under the count form's penalty beta > 0."""
    return math.floor((1 + 2 * TIE_BREAK) / penalty) + 1


@dataclass(frozen=True)
class Dynamic:
    """Ranked anew each round by factors and usage. The factors are columns that `jobs.fit factors` makes."""

    factors: str = "factors"
    """The piece whose columns .representativeness and .rarity are ranked by."""
    schedule: Schedule = "cosine"
    lead: float = 0.2
    """rho: how far a row may be ahead of the average usage of the whole run, as a share of it."""
    penalty: float | None = None
    """beta itself; None: 1 / (lead * rounds * keep fraction)."""
    usage: Literal["count", "frequency"] = "count"
    temperature: float = 0.0
    """Above 0: the top rows of score + temperature * Gumbel noise, so a draw instead of a ranking (0.05)."""

    fixed_size = True
    unbiased = False

    def __post_init__(self) -> None:
        if self.penalty is not None and not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be at least 0, got {self.penalty}")
        if not 0 < self.lead < math.inf:
            raise ValueError(f"lead must be above 0, got {self.lead}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the ranks of representativeness and of rarity."""
        return f"{self.factors}.representativeness", f"{self.factors}.rarity"

    @property
    def needs(self) -> frozenset[str]:
        """The factors' ranks, the usage, and what scales the penalty."""
        scale = {"planned_uses"} if self.penalty is None else set()
        over = {"mean_usage"} if self.usage == "count" else {"round"}
        return frozenset({*self.columns, "usage_count", "uid"} | scale | over)

    @property
    def records(self) -> Literal["score"]:
        """The ledger keeps no loss: what matters of it is the usage."""
        return "score"

    def beta(self, rows: Rows) -> float:
        """The penalty on one use."""
        if self.penalty is not None:
            return self.penalty
        return 1 / (self.lead * float(rows["planned_uses"]))

    def usage_gap(self, rows: Rows) -> int | None:
        """The law's bound on the difference of two rows' usage; None where there is none."""
        beta = self.beta(rows)
        return usage_gap(beta) if self.usage == "count" and beta > 0 and self.temperature == 0 else None

    def score(self, rows: Rows, progress: float) -> Tensor:
        """s (n,) float32, less a constant."""
        return self._score(rows, progress).float()

    def sort_key(self, rows: Rows, progress: float, seed: int) -> Tensor:
        """The score with its tie-break or its Gumbel noise, from hash(uid, seed)."""
        uniform = hash_uniform(uid_column_words(rows["uid"]), seed)
        noise = TIE_BREAK * uniform
        if self.temperature:
            # The hash gives multiples of 2**-53, and 0 has no logarithm.
            noise = self.temperature * -np.log(-np.log(uniform.clip(2.0**-54)))
        score = self._score(rows, progress)
        return (score + torch.from_numpy(noise).to(score.device)).float()

    def select(self, rows: Rows, keep: int | None, progress: float, rng: Generator) -> Selection:
        """The `keep` rows of the highest score, weight 1 each."""
        return select_by_sort_key(self, rows, keep=keep, progress=progress, rng=rng)

    def _score(self, rows: Rows, progress: float) -> Tensor:
        check_needs(self, rows)
        representative, rare = (rows[name].double() for name in self.columns)
        weight = rarity_weight(progress, self.schedule)
        usage = rows["usage_count"].double()
        if self.usage == "count":
            usage = usage - math.floor(float(rows["mean_usage"]))
        else:
            usage = usage / max(1.0, float(rows["round"]))
        return (1 - weight) * representative + weight * rare - self.beta(rows) * usage
