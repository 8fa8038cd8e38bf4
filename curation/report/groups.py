"""By what rows are grouped: language, host of the url, shorter side, clusters, and columns that are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from curation.columns import JSON_PREFIX
from curation.data import derived_columns
from curation.data.derived_columns import DERIVED, sources_of

MAX_GROUPS = 20_000
"""Values of a column that are told apart; what comes later is counted as OTHER."""
OTHER = "(all other values)"
UNKNOWN = "(no value)"
MIN_SIDES = (0, 64, 128, 256, 512, 1024, 2048)
LANGUAGES = ("language", "lang", "LANGUAGE")
URLS = ("url", "URL")
GroupOf = Callable[[pa.Table], list[str]]


class Group(NamedTuple):
    """Embedded rows that share a value of a column, and how many of them were kept."""

    value: str
    rows: int
    kept: int


def groupings(types: Mapping[str, pa.DataType], group_by: Sequence[str]) -> dict[str, tuple[tuple[str, ...], GroupOf]]:
    """Group -> the columns that it is made of, and a row's value. ValueError if one of `group_by` is not there."""
    found: dict[str, tuple[tuple[str, ...], GroupOf]] = {}
    for title, names in (("language", LANGUAGES), ("json.domain", ("domain",))):
        if column := _first_of(names, types):
            found[title] = ((column,), lambda table, column=column: _texts(table, column))
    if column := _first_of(URLS, types):
        found["domain"] = ((column,), lambda table, column=column: [_host(url) for url in _texts(table, column)])
    for column in sorted(types):
        if column.rpartition(".")[2] in ("cluster", "concept"):
            found[column] = ((column,), lambda table, column=column: _texts(table, column))
    found["shorter side"] = (sources_of("min_side"), _sides)
    for column in group_by:
        if column not in types and column not in DERIVED:
            raise ValueError(f"--by {column!r}: no table has such a column, they have {sorted(types)}")
        found[column] = (sources_of(column), lambda table, column=column: _texts(table, column))
    return found


def _first_of(names: Sequence[str], types: Mapping[str, pa.DataType]) -> str | None:
    """The first of the pool's own fields that is there."""
    return next((name for name in map(JSON_PREFIX.__add__, names) if name in types), None)


def count(counter: Counter[str], labels: np.ndarray, known: Counter[str] | None = None) -> None:
    """Count values; once there are MAX_GROUPS of them, a new one counts as OTHER. `known`: the values told apart."""
    known = counter if known is None else known
    for label, count in Counter(labels.tolist()).items():
        counter[label if label in known or len(known) < MAX_GROUPS else OTHER] += count


def _texts(table: pa.Table, column: str) -> list[str]:
    if column in DERIVED:
        return [UNKNOWN if np.isnan(value) else f"{value:g}" for value in derived_columns.numbers(table, column)]
    return [UNKNOWN if value is None or value == "" else str(value) for value in table[column].to_pylist()]


def _host(url: str) -> str:
    """The host of a URL, without the `www.` in front of it."""
    if url == UNKNOWN:
        return url
    try:
        host = urlsplit(url).hostname
    except ValueError:  # brackets that are no IPv6 address
        return UNKNOWN
    return host.removeprefix("www.") if host else UNKNOWN


def _sides(table: pa.Table) -> list[str]:
    """The power-of-two range that the shorter side lies in."""
    sides = derived_columns.numbers(table, "min_side")
    names = [f"{low}–{high - 1} px" for low, high in pairwise(MIN_SIDES)]
    names.append(f"{MIN_SIDES[-1]} px and more")
    places = np.searchsorted(MIN_SIDES, np.nan_to_num(sides), side="right") - 1
    return [UNKNOWN if np.isnan(side) else names[place] for side, place in zip(sides, places, strict=True)]
