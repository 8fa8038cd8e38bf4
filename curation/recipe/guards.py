"""What a selection always leaves out, before its own steps: lists, held-out parts, copies of evaluation sets."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curation.data.read_rules import ListKind
from curation.data.row_tests import check_disjoint
from curation.data.tables import check_piece_name
from curation.recipe.parts import Part, json_argument

REST = "rest"


class Exclude(Part):
    """Samples that are never kept: opt-outs, known-bad ones."""

    name: str = Field(min_length=1)
    """Why: what the account calls it."""
    files: str = Field(min_length=1)
    """Paths, globs or URLs, as a pool's: text, parquet, or .npy of u8,u8."""
    at_read: bool = False
    """Drop these samples when a shard is read, too: they are never decoded, and nothing of them is stored. Such a list
    is part of what makes the tables, so another one needs another output."""
    by: ListKind = "uid"
    """What an entry names: a sample's uid, the sha256 of its image's bytes, or its url (or the sha256 of that)."""


class Holdout(Part):
    """Parts of the pool that are kept apart by a hash: for a reference, for validating raters, for testing."""

    parts: dict[str, tuple[float, float]] = Field(min_length=1)
    """Name -> range [low, high) of the hash, within [0, 1): (0, 0.05) is 5% of any pool."""
    keep: str = REST
    """The part that this selection chooses from; `rest`: what is in none."""
    seed: int = Field(default=0, ge=0)
    by: Literal["uid", "sha256"] = "uid"
    """What is hashed. sha256: samples with the same image bytes are in the same part, also under other uids."""

    @model_validator(mode="after")
    def _are_disjoint(self) -> Self:
        for name, (low, high) in self.parts.items():
            if not 0 <= low < high <= 1 or name == REST or not name:
                raise ValueError(f"a holdout part is a name other than {REST!r} and 0 <= low < high <= 1, got {name!r}")
        if self.keep not in (REST, *self.parts):
            raise ValueError(f"holdout.keep must be {REST!r} or one of {sorted(self.parts)}, got {self.keep!r}")
        check_disjoint(self.parts, others={})
        return self


class Decontaminate(Part):
    """Copies of evaluation sets, which are cut from the selection."""

    sets: dict[str, str] = Field(min_length=1)
    """Name -> run of `jobs.curate` over the evaluation set, embedded by the same model."""
    exact: bool = True
    """Cut the images with the same bytes."""
    near: float | None = Field(default=0.95, gt=0, le=1)
    """Cut the images whose embedding has at least this cosine with one of the set's; none: only exact copies."""

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        for name in self.sets:
            check_piece_name(f"contamination-{name}")
        if not self.exact and self.near is None:
            raise ValueError("decontaminate cuts nothing: exact is off and near is none; leave it out instead")
        return self


ExcludeArgument = Annotated[tuple[Exclude, ...], json_argument(tuple[Exclude, ...], tuple)]
HoldoutArgument = Annotated[Holdout | None, json_argument(Holdout | None, (Holdout, NoneType))]
DecontaminateArgument = Annotated[Decontaminate | None, json_argument(Decontaminate | None, (Decontaminate, NoneType))]
