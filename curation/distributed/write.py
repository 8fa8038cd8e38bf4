"""The kept set, written: subset file, table, tars and parts of embeddings, one Ray task for a tar and its part.

Both are pieces: a manifest, written last, bears the digest of the rows that a piece was made from, so one that is there
is not written again, and one that belongs to a former selection is replaced or removed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import SELECTED_SCHEMA
from curation.data import manifest, storage
from curation.data.embeddings_folder import part_names, remove_part, write_part
from curation.data.read_rules import ReadRules
from curation.data.redact import redacted_json
from curation.data.tables import Rechunk, rechunked
from curation.data.uid_sort import UidSort
from curation.data.writers import (
    KEPT_SCHEMA,
    SHARD_FORMAT,
    remove_index,
    remove_tar,
    write_index,
    write_subset,
    write_tar,
)
from curation.distributed.select import Selected, kept_rows
from curation.distributed.tasks import ordered
from curation.numerics.sampling import uid_words
from curation.recipe import CurateRecipe

STAGE = "write"
EMBEDDINGS_STAGE = "embeddings"
ROWS_PER_GROUP = 100_000
MAX_LICENCES = 100


class Written(NamedTuple):
    """What was written: kept samples by licence, and by tar."""

    licences: dict[str, int]
    sizes: dict[str, int]


def write_selection(recipe: CurateRecipe, numbers: Sequence[int], selected: Selected, *, num_read: int) -> Written:
    """Write selection/ and, if the recipe wants them, shards/ and embeddings/; else what was ours in them is removed.

    The kept rows are streamed once, in order of address.
    """
    folder = storage.join(recipe.output, "selection")
    licences: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="curation-subset-") as spool:
        by_uid = UidSort(Path(spool), splitters_P2=selected.uid_bounds)
        with (
            storage.write_atomic(storage.join(folder, "selected.parquet")) as file,
            pq.ParquetWriter(file, SELECTED_SCHEMA) as table_out,
        ):
            kept = _noted(kept_rows(recipe.output, numbers, selected.decided), table_out, by_uid, licences)
            sizes = _write_pieces(recipe, kept, num_rows=selected.rows)
        words = (np.stack([block["high"], block["low"]], axis=1) for block in by_uid.sorted_blocks())
        write_subset(storage.join(folder, "subset.npy"), words, num_rows=selected.rows)
    shards = storage.join(recipe.output, "shards")
    if not recipe.write.tars:
        remove_index(shards)
    else:
        storage.copy(storage.join(folder, "subset.npy"), storage.join(shards, "sample_ids.npy"))
        arguments = redacted_json(recipe.model_dump(mode="json", exclude={"output", "compute"}))
        write_index(shards, sizes, arguments=arguments, num_read=num_read)
    return Written(_most_common(licences), sizes)


def _noted(
    kept: Iterator[pa.Table], table_out: pq.ParquetWriter, by_uid: UidSort, licences: Counter[str]
) -> Iterator[pa.Table]:
    """The kept rows, passed on as KEPT_SCHEMA; on the way they enter selected.parquet, the uid sort and the counts."""
    groups = Rechunk(ROWS_PER_GROUP)

    def write(groups_: Iterator[pa.Table]) -> None:
        for group in groups_:
            table_out.write_table(group, row_group_size=ROWS_PER_GROUP)

    for table in kept:
        n = table.num_rows
        table = table.append_column("weight", pa.array(np.ones(n, np.float32)))
        table = table.append_column("copies", pa.array(np.ones(n, np.uint32)))
        write(groups.add(table.select(SELECTED_SCHEMA.names)))
        by_uid.add(uid_words(table["uid"].to_pylist()), table["address"].to_numpy())
        licences.update(licence or "(none stated)" for licence in table["license"].to_pylist())
        yield table.select(KEPT_SCHEMA.names)
    write(groups.rest())


def _write_pieces(recipe: CurateRecipe, kept: Iterator[pa.Table], *, num_rows: int) -> dict[str, int]:
    """Write the wanted pieces that are not there yet, remove those of a former selection; samples by tar."""
    num_parts = -(-num_rows // recipe.write.samples_per_shard)
    wanted = PiecesSpec(
        recipe.output, recipe.write.tars, recipe.write.embeddings, recipe.pool.read_rules(), num_parts=num_parts
    )
    tars = manifest.committed(recipe.output, STAGE)
    parts = manifest.committed(recipe.output, EMBEDDINGS_STAGE)
    for stage, made in ((STAGE, tars), (EMBEDDINGS_STAGE, parts)):
        if made:
            manifest.index(recipe.output, stage, made)

    def jobs() -> Iterator[tuple[Any, ...]]:
        for index, rows in enumerate(rechunked(kept, recipe.write.samples_per_shard)):
            yield wanted, index, rows, tars.get(index), parts.get(index)

    sizes = dict(ordered(_write_piece, jobs())) if wanted.tars or wanted.embeddings else _without_pieces(kept)
    for index in sorted(tars.keys() - set(range(len(sizes) if wanted.tars else 0))):
        storage.delete(manifest.url_of(recipe.output, STAGE, index))
        remove_tar(storage.join(recipe.output, "shards"), index)
    for index in sorted(parts.keys() - set(range(len(sizes) if wanted.embeddings else 0))):
        storage.delete(manifest.url_of(recipe.output, EMBEDDINGS_STAGE, index))
        remove_part(storage.join(recipe.output, "embeddings"), parts[index]["names"])
    return sizes


def _without_pieces(kept: Iterator[pa.Table]) -> dict[str, int]:
    for _ in kept:
        pass
    return {}


def _most_common(licences: Counter[str]) -> dict[str, int]:
    most = dict(licences.most_common(MAX_LICENCES))
    rest = licences.total() - sum(most.values())
    return {**most, "(others)": rest} if rest else most


# What runs in a task.


class PiecesSpec(NamedTuple):
    """Which pieces are written, and from what."""

    output: str
    tars: bool
    embeddings: bool
    rules: ReadRules
    num_parts: int


def _write_piece(
    wanted: PiecesSpec, index: int, rows: pa.Table, tar: dict[str, Any] | None, part: dict[str, Any] | None
) -> tuple[str, int]:
    """Commit a tar and a part, as wanted; returns the tar's name and samples. `tar` and `part` are the committed
    records of that index, if there are any."""
    digest, name = _digest(rows), SHARD_FORMAT.format(index)
    if wanted.embeddings:
        _write_part(wanted, index, rows, digest, former=part)
    if not wanted.tars:
        return name, rows.num_rows
    return name, _write_tar(wanted, index, rows, digest, former=tar)


def _write_tar(wanted: PiecesSpec, index: int, rows: pa.Table, digest: str, *, former: dict[str, Any] | None) -> int:
    made_by = {"rows": digest}
    if wanted.rules.caption_field != "txt":  # tars of before this was noted held the pool's own txt
        made_by["txt"] = wanted.rules.caption_field
    if former and former["key"] == manifest.digest(made_by):
        return former["samples"]
    if former:  # first the manifest: a tar under a manifest of other rows must never be
        storage.delete(manifest.url_of(wanted.output, STAGE, index))
    samples = write_tar(storage.join(wanted.output, "shards"), index, rows, rules=wanted.rules)
    record = {"name": SHARD_FORMAT.format(index), "samples": samples}
    manifest.commit(wanted.output, STAGE, index, record, made_by=made_by)
    return samples


def _write_part(wanted: PiecesSpec, index: int, rows: pa.Table, digest: str, *, former: dict[str, Any] | None) -> None:
    folder, names = storage.join(wanted.output, "embeddings"), part_names(index, wanted.num_parts)
    made_by = {"rows": digest, "names": list(names)}
    if former and former["key"] == manifest.digest(made_by):
        return
    if former:
        storage.delete(manifest.url_of(wanted.output, EMBEDDINGS_STAGE, index))
        remove_part(folder, former["names"])
    write_part(folder, names, output=wanted.output, kept=rows["address"].to_numpy())
    manifest.commit(wanted.output, EMBEDDINGS_STAGE, index, {"names": list(names)}, made_by=made_by)


def _digest(rows: pa.Table) -> str:
    """sha256 of the rows, which with the immutable shards determine a tar's bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()
