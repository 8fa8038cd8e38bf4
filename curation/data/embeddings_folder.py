"""The kept samples' embeddings as clip-retrieval's folder, which autofaiss and embedding-reader read.

    img_emb/img_emb_K.npy, text_emb/text_emb_K.npy   float16 (n, D), unit norm
    metadata/metadata_K.parquet                      image_path (the key), caption, and the pool's own fields

K is written with as many digits as the largest part needs. Row k of the three files of a part is the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import addresses
from curation.columns import JSON_PREFIX
from curation.data import storage, tables

EMBEDDING_COLUMNS = ("image_embedding", "text_embedding")
OUR_COLUMNS = {"key": "image_path", "caption": "caption", "uid": "uid", "clip_score": "clip_score"}
"""Of our columns, those that the metadata have, and how they are called there."""


def part_names(index: int, num_parts: int) -> tuple[str, str, str]:
    """Names of the image embeddings, the text embeddings and the metadata of part `index` of `num_parts`."""
    part = f"{index:0{len(str(num_parts))}d}"
    return f"img_emb/img_emb_{part}.npy", f"text_emb/text_emb_{part}.npy", f"metadata/metadata_{part}.parquet"


def write_part(folder: str, names: Sequence[str], *, output: str, kept: np.ndarray) -> None:
    """Write a part under its names, from the sample tables of the run `output`: the rows at the addresses `kept` (n,).

    Addresses ascend; they are rows that were embedded.
    """
    numbers = addresses.shard_of(kept)
    rows = [_rows(output, int(number), addresses.row_of(kept[numbers == number])) for number in np.unique(numbers)]
    schema = tables.unify(part.schema for part in rows)
    table = pa.concat_tables(tables.conform(part, schema) for part in rows)
    for name, column in zip(names, EMBEDDING_COLUMNS, strict=False):
        with storage.write_atomic(storage.join(folder, name)) as file:
            np.save(file, tables.as_array(table[column], name=column))
    with storage.write_atomic(storage.join(folder, names[2])) as file:
        pq.write_table(_metadata(table), file)


def remove_part(folder: str, names: Sequence[str]) -> None:
    """Remove a part that an earlier selection of this run wrote."""
    for name in names:
        storage.delete(storage.join(folder, name))


def _rows(output: str, number: int, rows: np.ndarray) -> pa.Table:
    first, last = int(rows[0]), int(rows[-1])
    return tables.read(output, number, rows=range(first, last + 1)).take(pa.array(rows - first))


def _metadata(table: pa.Table) -> pa.Table:
    """Our columns under their names there, then the pool's fields under their own; a name is given once."""
    columns = {theirs: table[ours] for ours, theirs in OUR_COLUMNS.items()}
    for name in table.column_names:
        if name.startswith(JSON_PREFIX):
            columns.setdefault(name.removeprefix(JSON_PREFIX), table[name])
    # Readers that look at one part for the schema of all must not find a column of nulls only.
    texts = {name: pc.cast(c, pa.string()) if pa.types.is_null(c.type) else c for name, c in columns.items()}
    return pa.table(texts)
