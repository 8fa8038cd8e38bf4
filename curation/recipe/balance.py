"""Groups of rows: what is capped or filled by them, and what is told of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curation.recipe.parts import Part, json_argument


class Group(Part):
    """A column by which rows are grouped."""

    column: str = Field(min_length=1)
    """`url_domain`, `image_size`, `NAME.label` of a language, `NAME.cluster`, any text or whole number of the pool; or
    a number with edges."""
    edges: tuple[float, ...] = ()
    """For a number: a group is a range [low, high) between neighbouring edges."""

    @model_validator(mode="after")
    def _edges_ascend(self) -> Self:
        if any(high <= low for low, high in pairwise(self.edges)):
            raise ValueError(f"edges of {self.column!r} must ascend, got {self.edges}")
        return self


GroupsArgument = Annotated[tuple[Group, ...], json_argument(tuple[Group, ...], tuple)]


class Balance(Part):
    """A step: rows of each group up to a quota, drawn by a hash of the uid."""

    balance: str = Field(min_length=1)
    """The column, as in Group."""
    edges: tuple[float, ...] = ()
    cap: int | None = Field(default=None, ge=0)
    """At most so many rows of each group."""
    keep: int | None = Field(default=None, ge=0)
    """So many rows in all, spread over the groups as evenly as they allow."""
    quotas: dict[str, int] | None = None
    """So many rows of each group that is named; a group that has fewer keeps them all."""
    others: Literal["drop", "keep"] = "drop"
    """With quotas: what happens to the groups that are not named."""
    nulls: Literal["drop", "keep"] = "drop"
    """What happens to a row that is in no group."""

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        Group(column=self.balance, edges=self.edges)
        given = [name for name in ("cap", "keep", "quotas") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"balance: give one of cap, keep, quotas; got {given or 'none'}")
        if self.quotas is not None and (not self.quotas or min(self.quotas.values()) < 0):
            raise ValueError(f"balance: quotas must be counts of at least one group, got {self.quotas}")
        return self

    @property
    def name(self) -> str:
        """What the account calls this step."""
        how = (
            f"cap {self.cap}" if self.cap is not None else "quotas" if self.quotas is not None else f"keep {self.keep}"
        )
        return f"balance {self.balance}: {how}"


class Audit(Part):
    """Kept share and lift by group, for each step and in total."""

    groups: GroupsArgument = (Group(column="image_size"), Group(column="url_domain"))
    """None: no audit."""
    warn_lift: float = Field(default=2.0, gt=1)
    """A group is warned of when its lift is above this, or below one over this."""
    min_rows: int = Field(default=100, ge=1)
    """A smaller group is not warned of."""
    max_groups: int = Field(default=1000, ge=1)
    """Of a column with more groups, the largest are listed and the others are summed."""
