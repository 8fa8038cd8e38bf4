"""What a training run noted at each step: parquet parts, one for each stretch between checkpoints.

A part is named by its first step and written whole, before the checkpoint that ends its stretch; so steps that a crash
undid leave no row, and a stretch that is trained again writes the same part again. Columns may differ between parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import FORMAT_VERSION
from curation.data import storage

Row = dict[str, int | float | str | None]
"""What is noted of one step, by name."""


def write_part(output: str, name: str, rows: Sequence[Row]) -> None:
    """Write the rows of one stretch; each has its `step`. Nothing is written if there are none."""
    if not rows:
        return
    url = storage.join(output, "train", name, f"{rows[0]['step']:010d}.parquet")
    _write(url, pa.Table.from_pylist(list(rows)))


def read_parts(output: str, name: str) -> pa.Table:
    """All rows noted so far, in order of their steps; empty, with the column `step`, if there are none.

    A row is taken from the last part that has its step: with other checkpoints, stretches may overlap.
    """
    folder = storage.join(output, "train", name)
    parts = []
    for part in sorted(name for name in storage.names_in(folder) if name.endswith(".parquet")):
        with storage.open_read(storage.join(folder, part)) as file:
            parts.append(pq.read_table(file))
    if not parts:
        return pa.table({"step": pa.array([], pa.int64())})
    table = pa.concat_tables(parts, promote_options="permissive")
    last = {step: place for place, step in enumerate(table["step"].to_pylist())}
    return table.take([last[step] for step in sorted(last)])


def merge(output: str, name: str) -> pa.Table:
    """Write all rows as OUTPUT/train/NAME.parquet, and return them."""
    table = read_parts(output, name)
    _write(storage.join(output, "train", f"{name}.parquet"), table)
    return table


def _write(url: str, table: pa.Table) -> None:
    with storage.write_atomic(url) as file:
        pq.write_table(table.replace_schema_metadata({"format_version": str(FORMAT_VERSION)}), file)
