"""A rater's ratings of a whole pool, and percentiles of them, as made columns: pieces beside the sample tables.

A rating is of its row alone, so a shard's piece does not depend on the rest of the pool, nor on the order of its rows.
A percentile compares a row with all others: the ratings of the rows with the lowest hash of the uid, up to
`max_rows`, are sorted once and kept in the run's folder; a pool of no more rows has exact percentiles.

n rows, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from curation.data import manifest, storage, tables
from curation.data.mapped import mapped_arrays
from curation.data.rater_files import load_rater, rater_about
from curation.distributed import stored_columns
from curation.distributed.tasks import in_groups, ordered
from curation.models.rater import Rater
from curation.numerics.percentiles import percentiles, sorted_sample
from curation.numerics.sampling import tie_hash, uid_words
from curation.recipe.made_columns import Percentile, Rating
from curation.training.rater_run import RaterShape, new_rater, ratings_of

RELEASED_BATCH = 256
"""Rows that the authors' scoring script rates together, in file order."""


def rating_maker(column: Rating) -> Ratings:
    """The maker of ratings. ValueError if there is no such rater."""
    folder = storage.absolute(column.rater)
    about = rater_about(folder)
    return Ratings(column.name, folder, about["features"], about["sha256"], about["mode"] == "code")


@dataclass(frozen=True)
class Ratings:
    """Columns PIECE.logit and, of a rater in mode code, PIECE.released."""

    piece: str
    folder: str
    column: str
    digest: str
    with_released: bool

    @property
    def needs(self) -> frozenset[str]:
        """The features."""
        return frozenset({self.column})

    @property
    def made_by(self) -> dict[str, Any]:
        """The rater, and what it rates."""
        return {"rater": self.digest, "column": self.column}

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The rating of each row that has the features."""
        seen_MF, has_value = stored_columns.vectors_of(table, self.column)
        rater = _rater(self.folder, self.digest)
        made = {"logit": ratings_of(rater, seen_MF) if len(seen_MF) else np.zeros(0, np.float32)}
        if self.with_released:
            parts = [seen_MF[at : at + RELEASED_BATCH] for at in range(0, len(seen_MF), RELEASED_BATCH)]
            told = [rater.rate_as_released(torch.from_numpy(np.array(part))).detach().numpy() for part in parts]
            made["released"] = np.concatenate([np.zeros(0, np.float32), *told])
        return {
            part: stored_columns.aligned(pa.array(values.astype(np.float32)), has_value)
            for part, values in made.items()
        }


@functools.lru_cache(maxsize=2)
def _rater(folder: str, digest: str) -> Rater:
    state, about = load_rater(folder)
    if about["sha256"] != digest:
        raise ValueError(f"{folder} holds another rater than when the columns were begun")
    shape = RaterShape(**about["shape"])
    rater = new_rater(torch.zeros(2, about["num_features"]), shape, mode=about["mode"])
    for name in ("others_sum_MW", "others_square_MW"):  # buffers that are there only once they are known
        setattr(rater, name, state.get(name))
    rater.others = about["others"]
    rater.load_state_dict(state)
    return rater.eval()


def percentile_maker(output: str, column: Percentile, numbers: Sequence[int], *, folder: str) -> Percentiles:
    """The maker of percentiles; what they are read off is made once. ValueError if no row has a value."""
    how = {"of": column.of, "max_rows": column.max_rows, "made_by": _origin(output, column.of)}
    place = storage.join(output, folder, f"{column.name}-{manifest.digest(how)[:8]}")
    if not storage.exists(storage.join(place, "sorted.npy")):
        inputs = ((output, group, column.of, column.max_rows) for group in in_groups(numbers))
        sample = sorted_sample(_lowest(ordered(_values_of, inputs), column.max_rows)[1])
        with storage.write_atomic(storage.join(place, "sorted.npy")) as file:
            np.save(file, sample)
    return Percentiles(column.name, place, column.of, tuple(sorted(how.items())))


def _origin(output: str, column: str) -> dict[str, Any]:
    """What made a column, if a piece did: another rater's ratings have other percentiles."""
    made = manifest.committed(output, tables.piece_stage(tables.piece_of(column)))
    made_by = made[min(made)]["made_by"] if made else {}
    return {name: value for name, value in made_by.items() if name != "samples"}


@dataclass(frozen=True)
class Percentiles:
    """A column PIECE."""

    piece: str
    folder: str
    """Where sorted.npy lies."""
    column: str
    how: tuple[tuple[str, Any], ...]

    @property
    def needs(self) -> frozenset[str]:
        """The values."""
        return frozenset({self.column})

    @property
    def made_by(self) -> dict[str, Any]:
        """What is ranked."""
        return dict(self.how)

    def make(self, table: pa.Table) -> dict[str, pa.Array]:
        """The percentile of each row that has a value."""
        values = tables.as_numbers(table[self.column], name=self.column)
        [sample] = _sorted(self.folder)
        found = percentiles(values, sample)
        return {"": pa.array(found, mask=np.isnan(found))}


@functools.lru_cache(maxsize=4)
def _sorted(folder: str) -> list[np.ndarray]:
    return mapped_arrays(folder, ["sorted.npy"])


def _lowest(parts: Iterable[tuple[np.ndarray, np.ndarray]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The `limit` rows of the lowest hashes of all parts, with their values."""
    ties, values = np.zeros(0, np.uint64), np.zeros(0, np.float32)
    for more_ties, more_values in parts:
        ties, values = np.append(ties, more_ties), np.append(values, more_values)
        order = np.argsort(ties, kind="stable")[:limit]
        ties, values = ties[order], values[order]
    return ties, values


# What runs in a task.


def _values_of(output: str, numbers: list[int], column: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    def each() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in numbers:
            table = tables.read(output, number, ["uid", "status", column])
            table = table.filter((pc.field("status") == "ok") & pc.field(column).is_valid())
            values = tables.as_numbers(table[column], name=column).astype(np.float32)
            yield tie_hash(uid_words(table["uid"].to_pylist())), values

    return _lowest(each(), limit)
