"""A nightly run: a curation that grows with its pool, how its result is watched, and when it is held back."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from tyro.conf import arg

from curation.recipe.curate import CurateRecipe
from curation.recipe.parts import Part, WholeRecipe


class Drift(Part):
    """How far a night may be from the promoted one. Beyond any of these it is held back."""

    drop_share: float = Field(default=0.02, ge=0, le=1)
    """Change of a drop reason's share of what was read."""
    quantile: float = Field(default=0.02, ge=0)
    """Shift of a quantile of a watched score, in the score's own unit."""
    share: float = Field(default=0.05, ge=0, le=1)
    """Total variation of a watched column: the share of rows that would have to change their value."""
    kept: float = Field(default=0.5, ge=0)
    """Relative change of the number of kept rows."""
    cost: float = Field(default=1.0, ge=0)
    """Relative change of the actors' seconds per thousand images."""


class NightlyRecipe(WholeRecipe):
    """A nightly run. Its output holds the run, the nights, and the pointer to the promoted one."""

    curate: Annotated[CurateRecipe, arg(name="")] = CurateRecipe()
    """What is done each night; its output is the folder of the nights."""
    scores: tuple[str, ...] = ("clip_score",)
    """Numeric columns whose quantiles are watched."""
    shares: tuple[str, ...] = ()
    """Columns of few values whose shares are watched, such as json.language or a cluster that jobs.fit added."""
    drift: Drift = Drift()

    @model_validator(mode="after")
    def _watches_each_once(self) -> Self:
        for field in ("scores", "shares"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} names a column twice: {names}")
        return self
