"""Every column that flows through a run: its name, Arrow type and meaning. Nothing else names a column.

A column has one value per row; a run value has none (a scale, a threshold) and reaches selectors beside the columns.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 1
"""Version of the tables, manifests and recipes that this code writes. A newer one is refused on reading."""

JSON_PREFIX = "json."
"""The pool's own json fields become columns under this prefix, so they never overwrite ours."""

SAMPLE_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "address": (pa.int64(), "shard number * 2**20 + row: the sample's place in this pool"),
    "uid": (pa.string(), "32 lowercase hex digits: the sample's permanent id"),
    "key": (pa.string(), "the sample's name in its shard"),
    "shard": (pa.string(), "URL of the shard"),
    "offset": (pa.int64(), "where the sample begins: byte offset of its first header in a tar, row in a parquet file"),
    "status": (pa.string(), "'ok' or 'dropped'"),
    "reason": (pa.string(), "why it was dropped; null if it was not"),
    "caption": (pa.string(), "the caption; null if there is none"),
    "width": (pa.int32(), "pixels, as stored in the shard; null if the image was not opened"),
    "height": (pa.int32(), "pixels, as stored in the shard; null if the image was not opened"),
    "sha256": (pa.string(), "of the image bytes in the shard, 64 hex digits; null if there are none"),
    # image_embedding and text_embedding: fixed_size_list<float16>[D], unit norm, D known once a model is loaded.
    "clip_score": (pa.float32(), "cosine of the sample's image and text embedding, in [-1, 1]"),
}

CAPTION_FROM = "caption_from"
"""Where a caption stood that was chosen among several, as in json.captions[2]; only where the recipe lets choose."""

SELECTED_SCHEMA = pa.schema(
    [
        ("address", pa.int64()),
        ("uid", pa.string()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
        ("copies", pa.uint32()),
    ]
)

DROPS_SCHEMA = pa.schema(
    [("uid", pa.string()), ("shard", pa.string()), ("offset", pa.int64()), ("reason", pa.string())]
)

RUN_VALUES = frozenset(
    {
        "logit_scale",
        "logit_bias",
        "reference_logit_scale",
        "reference_logit_bias",
        "head_weight",
        "comparison_gradient",
        "pool_mean_loss",
    }
) | (ROUND_VALUES := frozenset({"round", "run_seed", "planned_uses", "mean_usage", "last_round_step"}))


LEDGER_COLUMNS = frozenset({"ledger_value", "ledger_variance", "ledger_count", "usage_count", "last_step"})
"""Columns that come from the ledger: what it remembers of a row's score and use."""


def is_run_value(name: str) -> bool:
    """True if `name` is a run value, False if it is a column."""
    return name in RUN_VALUES


def sample_schema(embedding_dim: int) -> pa.Schema:
    """Schema of a sample table, without the pool's own json columns."""
    embedding = pa.list_(pa.float16(), embedding_dim)
    fields = [(name, dtype) for name, (dtype, _) in SAMPLE_COLUMNS.items()]
    return pa.schema([*fields[:-1], ("image_embedding", embedding), ("text_embedding", embedding), fields[-1]])
