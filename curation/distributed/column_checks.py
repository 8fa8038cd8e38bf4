"""Whether the pool has what a recipe names, checked before a step runs: a mistyped column would make it do nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from curation.columns import JSON_PREFIX, SAMPLE_COLUMNS
from curation.data import tables
from curation.data.derived_columns import DERIVED
from curation.data.labels import LABELS
from curation.distributed.tasks import ordered
from curation.recipe import Balance, OneOf, Select, Step, Threshold


def check_columns(output: str, groups: Sequence[list[int]], wanted: Mapping[str, str]) -> None:
    """ValueError if no shard has a column, as with a mistyped name. `wanted`: column -> the recipe's field for it.

    A filter that keeps nulls, or a group of the audit, would do nothing for ever, and nobody would be told.
    """
    missing = wanted.keys() - SAMPLE_COLUMNS.keys() - DERIVED.keys() - LABELS.keys()
    if not missing or not groups:
        return
    known = frozenset().union(*ordered(_column_names, ((output, group) for group in groups)))
    for name in sorted(missing - known):
        own = sorted(column for column in known if column.startswith(JSON_PREFIX))
        nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.0)
        hint = f", did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"{wanted[name]}: no shard has a column {name!r}{hint} The pool's own fields are {own}")


def check_numbers(output: str, groups: Sequence[list[int]], columns: Iterable[str]) -> None:
    """ValueError if one of the pool's own fields, of which numbers are asked, has values and in no shard a number."""
    wanted = sorted({name for name in columns if name.startswith(JSON_PREFIX)})
    if not wanted:
        return
    refusals = list(ordered(_refusals, ((output, group, wanted) for group in groups)))
    for name in wanted:
        told = [part[name] for part in refusals if name in part]
        if told and all(told):
            raise ValueError(told[0])


def columns_of(steps: Sequence[Step]) -> dict[str, str]:
    """The columns that filters, balances and selectors name, as `check_columns` takes them."""
    names = {step.column for step in steps if isinstance(step, (Threshold, OneOf))}
    names |= {step.balance for step in steps if isinstance(step, Balance)}
    for step in steps:
        if isinstance(step, Select):
            names |= {name for name in step.selector().needs if name.startswith(JSON_PREFIX)}
    return dict.fromkeys(names, "selection")


def numbers_of(steps: Sequence[Step]) -> list[str]:
    """The columns of which filters, balances and selectors ask numbers."""
    asked = [step.column for step in steps if isinstance(step, Threshold)]
    asked += [step.balance for step in steps if isinstance(step, Balance) and step.edges]
    return asked + [name for step in steps if isinstance(step, Select) for name in step.selector().needs]


# What runs in a task: plain functions of one group of shards.


def _column_names(output: str, numbers: list[int]) -> frozenset[str]:
    return frozenset().union(*(tables.column_names(output, number) for number in numbers))


def _refusals(output: str, numbers: list[int], columns: list[str]) -> dict[str, str]:
    """Column that has values -> why it cannot be taken for numbers, empty as soon as a shard has one."""
    told: dict[str, str] = {}
    for name in columns:
        for number in numbers:
            column = tables.read(output, number, [name])[name]
            if column.null_count < len(column):
                try:
                    tables.as_numbers(column, name=name)
                except ValueError as error:
                    told[name] = str(error)
                else:
                    told[name] = ""
                    break
    return told
