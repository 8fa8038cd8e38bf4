"""The ledger: for every sample of a pool what it scored, how often and when, and how often it was used.

One flat array per column, as long as the pool, addressed by prefix sums of the shard sizes: no key is ever stored, and
pages that no sample was written to take no memory. A named ledger keeps one float32 statistic of a score (`last`,
`mean` or `ema`) with a 16-bit count and a 32-bit last step; the 16-bit usage count is shared by all of them. That is 12
bytes a sample for one ledger and 10 for each further one, where a dict of uids takes 250.

Laws. Counts, usage, last step and `last` do not depend on how a stream of updates is cut into batches, ordered, or
split over ledgers that are merged. A mean does not either, but for the rounding in `numerics/statistics.py`. An ema is
made by the order of the steps, so only one ledger may hold it for an address. A batch is checked whole before any of it
is applied. There is no lock: one writer at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from curation.addresses import flat_positions, pack, prefix_sums
from curation.numerics.column_stream import read_column, slices, write_column
from curation.numerics.folding import BLOCK_ROWS, SortedBatch
from curation.numerics.matching import moves
from curation.numerics.quantiles import NUM_BINS, count_bits, gini, quantiles_from_counts
from curation.numerics.statistics import SCAN_ROWS, Counts, LedgerSpec, Scores, Statistic

__all__ = ["Ledger", "LedgerSpec", "Statistic", "gini", "moves", "quantiles_from_counts"]

FORMAT_VERSION = 1
"""Version of the snapshots that this code writes. A newer one is refused on reading."""

HEAD = "ledger.json"
_FIELDS = {
    "num_shards": int,
    "shard_sizes_sha256": str,
    "specs": dict,
    "known": dict,
    "saturated": dict,
    "columns": dict,
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

OpenFile = Callable[[str], AbstractContextManager[BinaryIO]]


class Ledger:
    """Statistics of the samples of a pool, or of those of its shards that this ledger holds."""

    def __init__(self, shard_sizes: np.ndarray, specs: Mapping[str, LedgerSpec]) -> None:
        """`shard_sizes` (S,): rows of each shard by its number, 0 for a shard that this ledger does not hold.

        ValueError if a size is out of range, or a ledger's name is none that a file could bear.
        """
        for name in specs:
            if not _NAME.fullmatch(name) or name == "usage":
                raise ValueError(f"a ledger's name must be up to 64 of A-Z a-z 0-9 _ -, and not 'usage', got {name!r}")
        self._offsets = prefix_sums(shard_sizes)
        self._usage = Counts(self.num_samples)
        self._scores = {name: Scores(spec, self.num_samples) for name, spec in specs.items()}
        self._room = np.zeros(0, dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of the shards that this ledger holds, known or not."""
        return int(self._offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all columns once every page is touched."""
        return self.num_samples * sum(column.itemsize for column in self._columns().values())

    @property
    def names(self) -> tuple[str, ...]:
        """The named ledgers."""
        return tuple(self._scores)

    @property
    def specs(self) -> dict[str, LedgerSpec]:
        """What each named ledger keeps."""
        return {name: scores.spec for name, scores in self._scores.items()}

    def known(self, name: str) -> int:
        """Samples that have a score."""
        return self._named(name).count.known

    def saturated(self) -> dict[str, int]:
        """Samples whose 16-bit count is full, by ledger; "usage": whose usage count is."""
        return {"usage": self._usage.full, **{name: scores.count.full for name, scores in self._scores.items()}}

    # some samples

    def update(self, name: str, addresses: np.ndarray, values: np.ndarray, *, step: int) -> None:
        """Takes in the scores `values` (n,) of samples `addresses` (n,) int64 at a step; kept as float32, -0.0 as 0.0.

        An address may repeat: its count grows by how often it came; `last` takes the larger value, `mean` all of them,
        `ema` goes one step with their mean. ValueError names up to 5 values that are not finite, a step outside
        [0, 2**32), for `ema` an address that is at a later step, arrays that do not fit each other, or an unknown name;
        KeyError names the first address that no shard holds. After an error nothing has changed.
        """
        scores = self._named(name)
        if not 0 <= step < 1 << 32:
            raise ValueError(f"step must be in [0, 2**32), got {step}")
        addresses, values = _as_addresses(addresses), np.asarray(values)
        batch = SortedBatch(self._checked(addresses, values))
        if scores.spec.statistic == "ema":
            for folded in batch:
                scores.check_step(folded, addresses, step)
        for folded in batch:
            scores.update(folded, addresses, values, step=step)

    def add_usage(self, addresses: np.ndarray) -> None:
        """Counts each sample as used, as often as its address comes. KeyError as in `update`."""
        for folded in SortedBatch(self._checked(_as_addresses(addresses))):
            self._usage.add(folded.keys, folded.counts())

    def read(self, name: str, addresses: np.ndarray) -> dict[str, np.ndarray]:
        """The columns that a selector sees, (n,) each in the order of the addresses (n,), which may repeat.

        ledger_value float32 (NaN for a sample without a score), ledger_count uint16, usage_count uint16, last_step
        uint32, and ledger_variance float32 (NaN likewise) if it is kept. ValueError on an unknown name, KeyError as in
        `update`.
        """
        scores, addresses = self._named(name), _as_addresses(addresses)
        dtypes = {"ledger_value": "f4", "ledger_count": "u2", "usage_count": "u2", "last_step": "u4"}
        if scores.variance is not None:
            dtypes["ledger_variance"] = "f4"
        columns = {column: np.empty(len(addresses), dtype) for column, dtype in dtypes.items()}
        for rows in slices(len(addresses), BLOCK_ROWS):
            positions = flat_positions(addresses[rows], self._offsets)
            slots, count = scores.slots.take(positions), scores.count.column.take(positions)
            columns["ledger_value"][rows] = np.where(count > 0, slots["value"], np.nan)
            columns["ledger_count"][rows] = count
            columns["usage_count"][rows] = self._usage.column.take(positions)
            columns["last_step"][rows] = slots["last_step"]
            if scores.variance is not None:
                columns["ledger_variance"][rows] = np.where(count > 0, scores.variance.take(positions), np.nan)
        return columns

    def export(self, addresses: np.ndarray) -> dict[str, np.ndarray]:
        """The raw columns (n,) "usage", "NAME.value", ... at the addresses (n,), to be adopted at other addresses."""
        positions = self._positions(addresses)
        return {column: array[positions] for column, array in self._columns().items()}

    def adopt(self, addresses: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Writes raw columns (n,), as `export` gave them, at distinct addresses (n,) which nothing was written to yet.

        ValueError if the columns are not exactly those of this ledger, or if an address repeats or is in use already,
        which is named; KeyError as in `update`. After an error nothing has changed.
        """
        addresses, columns = _as_addresses(addresses), self._columns()
        if state.keys() != columns.keys():
            raise ValueError(f"state must have the columns {sorted(columns)}, got {sorted(state)}")
        for column, array in columns.items():
            came = state[column]
            if came.dtype != array.dtype or came.shape != addresses.shape:
                raise ValueError(
                    f"state[{column!r}] must be {array.dtype} {addresses.shape}, got {came.dtype} {came.shape}"
                )
        positions = self._positions(addresses)
        distinct, times = np.unique(addresses, return_counts=True)
        if len(distinct) < len(addresses):
            raise ValueError(f"address {distinct[np.argmax(times)]} came more than once")
        for counts in self._counts().values():
            if (used := counts.column.take(positions) > 0).any():
                raise ValueError(f"address {addresses[np.argmax(used)]} is in use already")
        self._write(positions, state)

    def forget(self, addresses: np.ndarray) -> None:
        """Makes samples untouched again. KeyError as in `update`."""
        positions = np.unique(self._positions(addresses))
        self._write(positions, {column: np.zeros(len(positions), a.dtype) for column, a in self._columns().items()})

    # all samples

    def histogram(self, name: str, edges: Sequence[float] | np.ndarray) -> np.ndarray:
        """Samples (m,) int64 by value in the bins between edges (m+1,), by numpy's rule: the last bin is closed.

        ValueError if the edges do not ascend.
        """
        edges = np.asarray(edges, dtype=np.float64)
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise ValueError(f"edges must be at least 2 ascending numbers, got {edges.tolist()}")
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        for values in self._known_values(name):
            counts += np.histogram(values, edges)[0]
        return counts

    def quantile_counts(self, name: str, *, prefix: int | None) -> np.ndarray:
        """What `quantiles_from_counts` asks for, (65536,) int64; the counts of ledgers of disjoint shards add up.

        ValueError if the prefix is not in [0, 65536).
        """
        if prefix is not None and not 0 <= prefix < NUM_BINS:
            raise ValueError(f"prefix must be None or in [0, {NUM_BINS}), got {prefix}")
        counts = np.zeros(NUM_BINS, dtype=np.int64)
        for values in self._known_values(name):
            counts += count_bits(values, prefix=prefix)
        return counts

    def quantiles(self, name: str, q: Sequence[float] | np.ndarray) -> np.ndarray:
        """Exact quantiles (len(q),) float32 of the values, as numpy's method "inverted_cdf"; NaN if none is known."""
        return quantiles_from_counts(lambda prefix: self.quantile_counts(name, prefix=prefix), q)

    def usage_histogram(self) -> np.ndarray:
        """Samples (65536,) int64 by usage count."""
        counts = np.zeros(NUM_BINS, dtype=np.int64)
        for rows in slices(self.num_samples, SCAN_ROWS):
            counts += np.bincount(self._usage.column[rows], minlength=NUM_BINS)
        return counts

    def merge(self, other: Ledger) -> None:
        """Takes in what `other` saw of the stream, as if this ledger had seen it too.

        ValueError if the shard sizes or the specs differ, or if both hold an ema of one address, which is named;
        nothing is merged then.
        """
        if not np.array_equal(self._offsets, other._offsets):
            raise ValueError("shard_sizes of the two ledgers differ, so they are not of one pool")
        if self.specs != other.specs:
            raise ValueError(f"specs of the two ledgers differ: {self.specs} and {other.specs}")
        for name, scores in self._scores.items():
            for rows in slices(self.num_samples, SCAN_ROWS) if scores.spec.statistic == "ema" else ():
                if len(both := scores.known_to_both(other._scores[name], rows)):
                    raise ValueError(f"both ledgers hold an ema {name!r} of address {self._address_at(int(both[0]))}")
        for rows in slices(self.num_samples, SCAN_ROWS):
            for name, scores in self._scores.items():
                scores.merge(other._scores[name], rows)
            used = rows.start + np.flatnonzero(other._usage.column[rows])
            self._usage.add(used, other._usage.column.take(used).astype(np.uint32))

    # snapshots

    def save(self, open_file: OpenFile) -> None:
        """Writes one .npy file per column and then, as the last one, ledger.json, which makes the snapshot whole.

        `open_file(name)` opens a file for writing. A column goes out in slices of at most 64 MiB, the only copy made.
        """
        columns: dict[str, dict[str, int]] = {}
        for name, array in self._columns().items():
            with open_file(f"{name}.npy") as file:
                columns[name] = write_column(file, array)
        head = {
            "format_version": FORMAT_VERSION,
            **_belonging(self._offsets, self.specs),
            **self._totals(),
            "columns": columns,
        }
        with open_file(HEAD) as file:
            file.write(json.dumps(head, indent=1).encode())

    @classmethod
    def load(cls, open_file: OpenFile, shard_sizes: np.ndarray, specs: Mapping[str, LedgerSpec]) -> Ledger:
        """The ledger that was saved; `open_file(name)` opens a file for reading.

        The pool may have grown since: shards after the saved ones are untouched. ValueError that names the field in
        which the snapshot is damaged, of a newer format, of another pool, or of other specs.
        """
        ledger = cls(shard_sizes, specs)
        with open_file(HEAD) as file:
            head = _parsed(file.read())
        num_shards = head["num_shards"]
        if not 0 <= num_shards < len(ledger._offsets):
            raise ValueError(f"shard_sizes has {len(ledger._offsets) - 1} shards, the snapshot has {num_shards}")
        saved = ledger._offsets[: num_shards + 1]
        for field, wanted in _belonging(saved, ledger.specs).items():
            if head[field] != wanted:
                raise ValueError(f"{field} of the snapshot is {head[field]}, wanted {wanted}")
        for name, array in ledger._columns().items():
            with open_file(f"{name}.npy") as file:
                read_column(file, array[: saved[-1]], head["columns"].get(name, {}), name=f"{name}.npy")
        for counts in ledger._counts().values():
            counts.recount()
        for field, found in ledger._totals().items():
            if head[field] != found:
                raise ValueError(f"{field} of the snapshot is {head[field]}, its columns hold {found}")
        return ledger

    # within

    def _checked(self, addresses: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Positions (n,) of a batch that may be applied, KeyError or ValueError if it may not: it is looked at whole
        before any of it is. They hold until the next call, as they lie in memory that is kept for them: a large array
        made anew would cost its page faults."""
        if values is not None and values.shape != addresses.shape:
            raise ValueError(f"values must be one per address, got {values.shape} for addresses {addresses.shape}")
        if len(self._room) < len(addresses):
            self._room = np.zeros(len(addresses), dtype=np.int64)
        for rows in slices(len(addresses), BLOCK_ROWS):
            self._room[rows] = flat_positions(addresses[rows], self._offsets)
            if values is not None and not _finite(values[rows]).all():
                wrong = np.flatnonzero(~_finite(values))
                named = ", ".join(f"{addresses[row]}:{values[row]}" for row in wrong[:5])
                raise ValueError(f"values must be finite in float32, {len(wrong)} are not (address:value): {named}")
        return self._room[: len(addresses)]

    def _named(self, name: str) -> Scores:
        if name not in self._scores:
            nearest = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"no ledger is named {name!r}{hint} There are {list(self.names)}")
        return self._scores[name]

    def _columns(self) -> dict[str, np.ndarray]:
        """Views of all columns by their name in a snapshot."""
        columns = {"usage": self._usage.column}
        for name, scores in self._scores.items():
            columns |= {f"{name}.{column}": array for column, array in scores.columns().items()}
        return columns

    def _counts(self) -> dict[str, Counts]:
        """The columns that keep totals, by the same name as in `_columns`."""
        return {"usage": self._usage, **{f"{name}.count": scores.count for name, scores in self._scores.items()}}

    def _totals(self) -> dict[str, Any]:
        return {"known": {name: self.known(name) for name in self.names}, "saturated": self.saturated()}

    def _write(self, positions: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Writes raw columns (u,) at distinct positions (u,)."""
        counts = self._counts()
        for name, array in self._columns().items():
            if name in counts:
                counts[name].put(positions, state[name], before=array[positions])
            else:
                array[positions] = state[name]

    def _positions(self, addresses: np.ndarray) -> np.ndarray:
        return flat_positions(_as_addresses(addresses), self._offsets)

    def _address_at(self, position: int) -> int:
        shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return int(pack(shard, position - self._offsets[shard : shard + 1])[0])

    def _known_values(self, name: str) -> Iterator[np.ndarray]:
        """The values of known samples, a slice of the pool at a time."""
        scores = self._named(name)
        for rows in slices(self.num_samples, SCAN_ROWS):
            known = scores.count.column[rows] > 0
            if known.any():
                yield scores.slots["value"][rows][known]


def _as_addresses(addresses: np.ndarray) -> np.ndarray:
    """(n,) int64. ValueError if they are no row of integers: a float would lose the last digits of an address."""
    addresses = np.asarray(addresses)
    if addresses.ndim != 1 or (len(addresses) and addresses.dtype.kind not in "iu"):
        raise ValueError(f"addresses must be integers (n,), got {addresses.dtype} {addresses.shape}")
    return addresses.astype(np.int64, copy=False)


def _finite(values: np.ndarray) -> np.ndarray:
    """Which of the values (n,) are finite, and not too large for a float32."""
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32, copy=False))


def _belonging(offsets: np.ndarray, specs: Mapping[str, LedgerSpec]) -> dict[str, Any]:
    """What a snapshot must agree in with the ledger that loads it."""
    return {
        "num_shards": len(offsets) - 1,
        "shard_sizes_sha256": hashlib.sha256(np.diff(offsets).astype("<i8").tobytes()).hexdigest(),
        "specs": {name: asdict(spec) for name, spec in specs.items()},
    }


def _parsed(data: bytes) -> dict[str, Any]:
    """The snapshot's head. ValueError if it is damaged or of a newer format."""
    try:
        head = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{HEAD} is damaged: {error}") from error
    version = head.get("format_version") if isinstance(head, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{HEAD} is damaged: format_version is {version}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{HEAD} has format_version {version}, this code reads up to {FORMAT_VERSION}: update curation"
        )
    for field, kind in _FIELDS.items():
        if not isinstance(head.get(field), kind):
            raise ValueError(f"{HEAD} is damaged: {field} is {head.get(field)}")
    return head
