"""Kept share and lift of the groups that rows fall into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from curation.numerics.intervals import wilson
from curation.report.folder import AuditedGroup
from curation.report.groups import UNKNOWN, Group

GROUPS_SHOWN = 10
SAME = {"url_domain": "domain", "image_size": "shorter side"}
"""Columns of a run's own audit, and what the tables tell of the same."""


class GroupView(NamedTuple):
    """A group's kept share with its interval, and lift: its kept share over that of all rows."""

    value: str
    rows: int
    kept: int
    share: float
    low: float
    high: float
    lift: float


class GroupTable(NamedTuple):
    """The largest groups of a column, and how many rows are in the others."""

    column: str
    groups: list[GroupView]
    num_others: int
    rows_of_others: int


def group_tables(
    scanned: Mapping[str, Sequence[Group]], audited: Sequence[AuditedGroup], *, embedded: int, kept: int
) -> list[GroupTable]:
    """A table for each column: those of the scan, and of the run's own audit the columns that it has besides."""
    groups = dict(scanned)
    for column in dict.fromkeys(group.column for group in audited):
        if not {column, column.removeprefix("json."), SAME.get(column)} & scanned.keys():
            rows = [Group(each.value or UNKNOWN, each.rows, each.kept) for each in audited if each.column == column]
            groups[column] = sorted(rows, key=lambda group: -group.rows)
    return [_group_table(column, rows, embedded, kept) for column, rows in groups.items()]


def _group_table(column: str, rows: Sequence[Group], embedded: int, kept: int) -> GroupTable:
    overall = kept / embedded if embedded else 0.0
    views = []
    for group in rows[:GROUPS_SHOWN]:
        share = group.kept / group.rows if group.rows else 0.0
        low, high = wilson(group.kept, group.rows)
        views.append(
            GroupView(group.value, group.rows, group.kept, share, low, high, share / overall if overall else 0.0)
        )
    return GroupTable(column, views, len(rows) - len(views), sum(group.rows for group in rows[GROUPS_SHOWN:]))
