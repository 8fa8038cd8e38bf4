"""Words that say to which group a row belongs: a language, the domain of its url, a range of sizes or other numbers.

A column of text, truth values or whole numbers (1.0 is one) is its own label. A column of other numbers needs edges:
the label is the range [low, high) that the number is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.columns import JSON_PREFIX
from curation.data import derived_columns
from curation.data.derived_columns import DERIVED
from curation.data.json_columns import as_text

URL_FIELDS = ("url", "URL")
URL_COLUMNS = tuple(JSON_PREFIX + name for name in URL_FIELDS)
SIZE_EDGES = (64.0, 128.0, 256.0, 512.0, 1024.0)

LABELS: dict[str, tuple[str, ...]] = {
    "url_domain": URL_COLUMNS,
    "image_size": derived_columns.sources_of("min_side"),
}
"""Labels that are made of other columns -> these. `image_size` is the range of the shorter side, in pixels."""


def sources_of(name: str) -> tuple[str, ...]:
    """The columns that are read for a label."""
    return LABELS.get(name) or derived_columns.sources_of(name)


def labels(table: pa.Table, name: str, *, edges: Sequence[float] = ()) -> pa.Array:
    """A label of each row as text (n,), null where there is no value. ValueError if fractions need edges."""
    if name == "url_domain":
        urls = pc.call_function("coalesce", [as_text(table[column]) for column in URL_COLUMNS])
        return pa.array([None if url is None else domain_of(url) for url in urls.to_pylist()], pa.string())
    if name == "image_size":
        return ranges(derived_columns.numbers(table, "min_side"), SIZE_EDGES)
    if edges:
        return ranges(derived_columns.numbers(table, name), edges)
    if name not in DERIVED and not pa.types.is_floating(table[name].type):
        return as_text(table[name]).combine_chunks()
    values = derived_columns.numbers(table, name)
    has_value = ~np.isnan(values)
    # A shard stores whole numbers as floats where one of them is 1.0: it is the group of another shard's 1.
    if name in DERIVED or not all(value.is_integer() for value in values[has_value].tolist()):
        raise ValueError(f"column {name!r} holds numbers: a label needs edges between their ranges")
    texts = [str(int(value)) if known else None for value, known in zip(values, has_value, strict=True)]
    return pa.array(texts, pa.string())


def ranges(values_N: np.ndarray, edges: Sequence[float]) -> pa.Array:
    """The range of each number as text, null for NaN: "< 64", "64 to 128", ..., ">= 1024" for ascending edges."""
    words = [f"< {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(edges))]
    words.append(f">= {edges[-1]:g}")
    places = np.searchsorted(np.asarray(edges, np.float64), values_N, side="right")
    return pa.array(words).take(pa.array(places, mask=np.isnan(values_N)))


def domain_of(url: str) -> str:
    """The host of a url, lower case and without "www."; "(none)" if it has none."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # such as an unclosed bracket
        host = None
    return (host or "(none)").removeprefix("www.")
