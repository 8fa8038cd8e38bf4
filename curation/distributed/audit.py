"""What a selection did, step by step and group by group: selection/waterfall.parquet and selection/audit.parquet.

A group's lift at a step is its kept share divided by that of all rows: 1 means that the step is blind to the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage
from curation.data.tallies import GroupCounts, Label
from curation.distributed.column_checks import check_numbers
from curation.distributed.select import Selected, StepCount, tally
from curation.distributed.tasks import in_groups
from curation.recipe import Audit, CurateRecipe, Select

VERSION = {"format_version": str(FORMAT_VERSION)}
WATERFALL_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("name", pa.string()),
        ("rows_in", pa.int64()),
        ("removed", pa.int64()),
        ("rows_out", pa.int64()),
        ("examples", pa.list_(pa.int64())),
    ],
    metadata=VERSION,
)
"""`examples`: addresses of rows that the step removed, at most 8."""

AUDIT_SCHEMA = pa.schema(
    [
        ("column", pa.string()),
        ("group", pa.string()),
        ("step", pa.int32()),
        ("name", pa.string()),
        ("rows_in", pa.int64()),
        ("rows_out", pa.int64()),
        ("kept_share", pa.float64()),
        ("lift", pa.float64()),
        ("warned", pa.bool_()),
    ],
    metadata=VERSION,
)
"""`step` is that of the waterfall, -1 the whole selection; `group` is null for rows without a label; a share or lift of
no rows is null."""

TOTAL, OTHERS = "(all steps)", "(other groups)"


def write_waterfall_and_audit(recipe: CurateRecipe, numbers: Sequence[int], selected: Selected) -> dict[str, int]:
    """Write both tables; the warnings are how many groups the audit warns of. One pass for each column.

    ValueError if a group's edges part a field that holds no numbers.
    """
    folder = storage.join(recipe.output, "selection")
    _write(storage.join(folder, "waterfall.parquet"), waterfall_table(selected.counts))
    names = [count.name for count in selected.counts[1:]]  # repeats of a uid are no candidates
    rows: list[dict[str, Any]] = []
    groups = in_groups(numbers)
    asked_by_selectors = [step.selector() for step in recipe.selection if isinstance(step, Select)]
    for column, edges in dict.fromkeys(s.audited_by for s in asked_by_selectors if hasattr(s, "audited_by")):
        counts = tally(recipe.output, groups, selected.decided, GroupCounts(Label(column, edges)))
        # What a selector does by design is told, and not warned of.
        rows += [{**row, "warned": False} for row in audit_rows(column, counts or {}, names, recipe.audit)]
    check_numbers(recipe.output, groups, (group.column for group in recipe.audit.groups if group.edges))
    for group in recipe.audit.groups:
        counts = tally(recipe.output, groups, selected.decided, GroupCounts(Label(group.column, group.edges)))
        rows += audit_rows(group.column, counts or {}, names, recipe.audit)
    _write(storage.join(folder, "audit.parquet"), pa.Table.from_pylist(rows, AUDIT_SCHEMA))
    warned = sum(row["warned"] and row["step"] == -1 for row in rows)
    return {"audit:lift": warned} if warned else {}


def waterfall_table(counts: Sequence[StepCount]) -> pa.Table:
    """One row for each step."""
    rows = [
        {
            "step": step,
            "name": count.name,
            "rows_in": count.rows_in,
            "removed": count.rows_in - count.rows_out,
            "rows_out": count.rows_out,
            "examples": list(count.examples),
        }
        for step, count in enumerate(counts)
    ]
    return pa.Table.from_pylist(rows, WATERFALL_SCHEMA)


def audit_rows(
    column: str, counts: Mapping[str | None, np.ndarray], names: Sequence[str], audit: Audit
) -> list[dict[str, Any]]:
    """What is told of a column: label -> rows left after each of the S steps (S + 1,), and the steps' names (S)."""
    by_size = sorted(counts.items(), key=lambda item: (-int(item[1][0]), item[0] or ""))
    told = dict(by_size[: audit.max_groups])
    if rest := by_size[audit.max_groups :]:
        told[OTHERS] = np.sum([values for _, values in rest], axis=0)
    whole = np.sum(list(counts.values()), axis=0) if counts else np.zeros(len(names) + 1, np.int64)
    steps = [(-1, TOTAL, 0, len(names)), *((step + 1, name, step, step + 1) for step, name in enumerate(names))]
    return [
        {"column": column, "group": group, "step": step, "name": name, **_shares(values, whole, before, after, audit)}
        for step, name, before, after in steps
        for group, values in told.items()
    ]


def _shares(values: np.ndarray, whole: np.ndarray, before: int, after: int, audit: Audit) -> dict[str, Any]:
    rows_in, rows_out = int(values[before]), int(values[after])
    share = rows_out / rows_in if rows_in else None
    lift = None if share is None or not whole[after] else share / (int(whole[after]) / int(whole[before]))
    is_far = lift is not None and not 1 / audit.warn_lift <= lift <= audit.warn_lift
    return {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "kept_share": share,
        "lift": lift,
        "warned": is_far and rows_in >= audit.min_rows,
    }


def warned_groups(output: str) -> Iterator[dict[str, Any]]:
    """The groups that the whole selection's audit warns of, the farthest from a lift of 1 first."""
    with storage.open_read(storage.join(output, "selection", "audit.parquet")) as file:
        rows = pq.read_table(file).to_pylist()
    warned = [row for row in rows if row["warned"] and row["step"] == -1]
    yield from sorted(warned, key=lambda row: -abs(np.log(max(row["lift"], 1e-9))))


def _write(url: str, table: pa.Table) -> None:
    with storage.write_atomic(url) as file:
        pq.write_table(table, file)
