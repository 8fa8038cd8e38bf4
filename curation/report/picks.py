"""Rows to show, and rows to compute with: both chosen by keys, so they are the same each time, and bounded.

n rows of a shard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from curation.numerics.sampling import hash_words

SAMPLE_ROWS = 1_000_000
SHOWN = 24
"""Rows that are remembered for each thing to show."""
JUST_KEPT, JUST_CUT = "just kept", "just cut"
"""Rows next to the cut of the last selector."""


class Shown(NamedTuple):
    """A row to show, with the key by which it was chosen."""

    key: float
    address: int


@dataclass
class Picks:
    """For each thing to show, the SHOWN rows with the smallest keys."""

    chosen: dict[Any, list[Shown]] = field(default_factory=lambda: defaultdict(list))

    def add(self, what: Any, keys_n: np.ndarray, addresses_n: np.ndarray) -> None:
        """Offer rows (n,) with their keys; rows whose key is not finite are never shown."""
        finite = np.flatnonzero(np.isfinite(keys_n))
        nearest = finite[np.argsort(keys_n[finite], kind="stable")[:SHOWN]]
        offered = [Shown(float(keys_n[place]), int(addresses_n[place])) for place in nearest]
        self.chosen[what] = sorted([*self.chosen[what], *offered])[:SHOWN]

    def addresses(self, what: Any, count: int = SHOWN) -> list[int]:
        """The addresses of what is shown, nearest first."""
        return [shown.address for shown in self.chosen.get(what, [])[:count]]


def offer_near_the_cut(
    picks: Picks, score_n: np.ndarray, what: np.ndarray, addresses: np.ndarray, *, cut_by: str
) -> None:
    """Offer the lowest of what was kept, and the highest of what the selector cut."""
    score = score_n.astype(np.float64)
    picks.add(JUST_KEPT, np.where(what == "kept", score, np.nan), addresses)
    picks.add(JUST_CUT, np.where(what == cut_by, -score, np.nan), addresses)


class RowSample:
    """Rows with the smallest hashes: all of them, or a uniform sample of at least half SAMPLE_ROWS."""

    def __init__(self) -> None:
        self.seen = 0
        self._parts: list[dict[str, np.ndarray]] = []
        self._size = 0
        self._below = np.inf

    def add(
        self,
        hashes: np.ndarray,
        addresses: np.ndarray,
        is_kept: np.ndarray,
        digests: np.ndarray,
        scores: Mapping[str, np.ndarray],
    ) -> None:
        self.seen += len(hashes)
        part = {"hash": hashes, "address": addresses, "kept": is_kept, "digest": digests}
        part |= {f"score:{name}": values for name, values in scores.items()}
        self._take({name: column[hashes < self._below] for name, column in part.items()})
        if self._size > SAMPLE_ROWS:
            whole = self._joined()
            self._below = float(np.median(whole["hash"]))
            self._parts, self._size = [], 0
            self._take({name: column[whole["hash"] < self._below] for name, column in whole.items()})

    def _take(self, part: dict[str, np.ndarray]) -> None:
        self._parts.append(part)
        self._size += len(part["hash"])

    def _joined(self) -> dict[str, np.ndarray]:
        if not self._parts:
            return {
                "hash": np.zeros(0),
                "address": np.zeros(0, np.int64),
                "kept": np.zeros(0, bool),
                "digest": np.zeros(0, np.uint64),
            }
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        whole = self._joined()
        scores = {name.removeprefix("score:"): values for name, values in whole.items() if name.startswith("score:")}
        known = {name: values for name, values in scores.items() if np.isfinite(values).any()}
        return whole["address"], whole["kept"], whole["digest"], known


def hash_of(addresses_n: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each address, the same for ever."""
    words = np.stack([np.zeros(len(addresses_n), np.uint64), addresses_n.astype(np.uint64)], axis=1)
    return hash_words(words, seed=0).astype(np.float64) / 2**64


def digests_of(column: pa.ChunkedArray) -> np.ndarray:
    """64 bits of each sha256 (n,) uint64; 0 where there is none."""
    return np.array([int(value[:16], 16) if value else 0 for value in column.to_pylist()], np.uint64)


def alike(digests: np.ndarray, addresses: np.ndarray) -> list[list[int]]:
    """Groups of rows with the same image bytes, the largest first."""
    values, counts = np.unique(digests[digests != 0], return_counts=True)
    repeated = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
    return [addresses[digests == np.uint64(value)].tolist() for count, value in repeated[:SHOWN] if count > 1]
