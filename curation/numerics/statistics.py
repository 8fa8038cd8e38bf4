"""Running statistics of scores in flat arrays: what is stored per sample, and how it takes in new values.

`last` is the value of the largest step, of equal steps the larger value. `mean` is the mean of all values. `ema` is
decay * stored + (1 - decay) * new at every step, the first value whole. Values are stored in float32 and computed in
float64. Counts have 16 bits and stop at 65535, where a mean goes on as an average in which a new value weighs 1/65535.

A mean's error after c values is about sqrt(c) / 6 units in the last place of the largest of them, as for any running
mean in float32 whose rounding has no bias: 1.4e-6 relative after 5,000 values, 5e-6 at the full count.

n rows of a batch; u samples, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from curation.numerics.column_stream import slices
from curation.numerics.folding import Fold

Statistic = Literal["last", "mean", "ema"]

COUNT_FULL = 65535
SCAN_ROWS = 1 << 20
"""Rows that a pass over all samples takes at once."""

LARGEST = float(np.finfo(np.float32).max)
SLOT = np.dtype([("value", np.float32), ("last_step", np.uint32)])
"""Side by side: in a pool beyond every cache an update then waits for two cache lines instead of three."""

# Roberts 2018, "The unreasonable effectiveness of quasirandom sequences": the steps of an even lattice in the plane.
_STEP_OF_TICK, _STEP_OF_KEY = np.uint32(0xC13FA9A9), np.uint32(0x91E10DA5)
_LOST_BITS = 29
"""Bits of a float64's fraction that a float32 has no room for."""


@dataclass(frozen=True)
class LedgerSpec:
    """What one named ledger keeps of a score.

    `decay` in [0, 1) and `variance` are read for `ema` only; the variance, of the same exponential weights, takes 4
    bytes a sample more. ValueError on impossible fields.
    """

    statistic: Statistic = "last"
    decay: float = 0.9
    variance: bool = False

    def __post_init__(self) -> None:
        if self.statistic not in ("last", "mean", "ema"):
            raise ValueError(f"statistic must be 'last', 'mean' or 'ema', got {self.statistic!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.variance and self.statistic != "ema":
            raise ValueError(f"variance is kept for statistic 'ema' only, got {self.statistic!r}")


class Counts:
    """One 16-bit count per sample that stops at 65535; how many samples have any, and how many are full."""

    def __init__(self, num_samples: int) -> None:
        self.column = np.zeros(num_samples, dtype=np.uint16)
        self.known = 0
        self.full = 0

    def add(self, positions: np.ndarray, added: np.ndarray) -> None:
        """Adds counts (u,) uint32 at distinct positions (u,)."""
        before = self.column.take(positions)
        self.put(positions, np.minimum(before + added, np.uint32(COUNT_FULL)).astype(np.uint16), before=before)

    def put(self, positions: np.ndarray, after: np.ndarray, *, before: np.ndarray) -> None:
        """Writes counts (u,) uint16 at distinct positions (u,) where those `before` (u,) stand."""
        self.column[positions] = after
        self.known += int(np.count_nonzero(after)) - int(np.count_nonzero(before))
        self.full += int(np.count_nonzero(after == COUNT_FULL)) - int(np.count_nonzero(before == COUNT_FULL))

    def recount(self) -> None:
        """Takes the totals from the column, after it was filled from outside."""
        parts = [self.column[rows] for rows in slices(len(self.column), SCAN_ROWS)]
        self.known = sum(int(np.count_nonzero(part)) for part in parts)
        self.full = sum(int(np.count_nonzero(part == COUNT_FULL)) for part in parts)


class Scores:
    """The columns of one named ledger by position: value and last step, count, and the variance if it is kept."""

    def __init__(self, spec: LedgerSpec, num_samples: int) -> None:
        self.spec = spec
        self.slots = np.zeros(num_samples, dtype=SLOT)
        self.count = Counts(num_samples)
        self.variance = np.zeros(num_samples, dtype=np.float32) if spec.variance else None

    def columns(self) -> dict[str, np.ndarray]:
        """Views of the columns by name. What is written into "count" must be told to `count.put`."""
        columns = {"value": self.slots["value"], "last_step": self.slots["last_step"], "count": self.count.column}
        return columns if self.variance is None else {**columns, "variance": self.variance}

    def check_step(self, folded: Fold, addresses: np.ndarray, step: int) -> None:
        """ValueError that names the first sample of a block that is beyond a step, which an `ema` cannot take in."""
        last_step = self.slots.take(folded.keys)["last_step"]
        if (last_step > step).any():
            row = int(np.argmax(last_step > step))
            address = addresses[folded.firsts(folded.order)[row]]
            raise ValueError(f"ema of address {address} is at step {last_step[row]}, step {step} comes too late")

    def update(self, folded: Fold, addresses: np.ndarray, values: np.ndarray, *, step: int) -> None:
        """Takes in what a step brought for a block of positions; `addresses` and `values` (n,), which are finite in
        float32, are those of the whole batch."""
        came = in_float32(values.take(folded.order))
        merged = folded.largest(came) if self.spec.statistic == "last" else folded.means(came)
        dither = folded.keys
        if self.spec.statistic == "mean":
            # The address, not the position: a ledger that holds other shards too then stores the same mean.
            dither = addresses.take(folded.firsts(folded.order))
        self._take_in(folded.keys, merged, folded.counts(), step=step, dither=dither)

    def known_to_both(self, other: Scores, rows: slice) -> np.ndarray:
        """Positions among the rows that have a score here and there, ascending."""
        return rows.start + np.flatnonzero((self.count.column[rows] > 0) & (other.count.column[rows] > 0))

    def merge(self, other: Scores, rows: slice) -> None:
        """Takes in rows of another part of the stream; for `ema`, rows of which none is known to both."""
        positions = rows.start + np.flatnonzero(other.count.column[rows])
        theirs, added = other.slots.take(positions), other.count.column.take(positions).astype(np.uint32)
        self._take_in(positions, theirs["value"], added, step=theirs["last_step"], dither=positions)
        if self.variance is not None and other.variance is not None:
            self.variance[positions] = other.variance.take(positions)

    def _take_in(
        self,
        positions: np.ndarray,
        values: np.ndarray,
        added: np.ndarray,
        *,
        step: int | np.ndarray,
        dither: np.ndarray,
    ) -> None:
        """Values (u,) at distinct positions (u,), each of which stands for `added` (u,) values up to a step."""
        old, count = self.slots.take(positions), self.count.column.take(positions)
        old_value, old_step = old["value"], old["last_step"]
        new = np.empty_like(old)
        new["last_step"] = step if (all_later := bool((old_step < step).all())) else np.maximum(old_step, step)
        after = count + added
        if self.spec.statistic == "last":
            new["value"] = values if all_later else _last(old_value, old_step, values, step, known=count > 0)
        elif self.spec.statistic == "mean":
            exact = old_value + (values - old_value.astype(np.float64)) * _weight(count, added)
            new["value"] = dithered(exact, tick=after + np.asarray(step, dtype=np.uint32), keys=dither)
        else:
            new["value"] = self._ema(positions, old_value.astype(np.float64), values, known=count > 0)
        self.slots[positions] = new
        self.count.put(positions, np.minimum(after, np.uint32(COUNT_FULL)).astype(np.uint16), before=count)

    def _ema(self, positions: np.ndarray, old: np.ndarray, values: np.ndarray, *, known: np.ndarray) -> np.ndarray:
        """The averages (u,) after a step; writes the variance, which is 0 at the first value, at most LARGEST, and else
        decay * (variance + (1 - decay) * (new - stored)**2): Finch 2009, "Incremental calculation of weighted mean and
        variance", for exponential weights."""
        decay = self.spec.decay
        if self.variance is not None:
            spread = decay * (self.variance.take(positions) + (1 - decay) * np.square(values - old))
            self.variance[positions] = np.where(known, np.minimum(spread, LARGEST), 0)
        return np.where(known, decay * old + (1 - decay) * values, values)


def in_float32(values: np.ndarray) -> np.ndarray:
    """A copy (n,) float32, without -0.0, whose order to 0.0 would hang on the machine; infinite what is too large."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False) + np.float32(0)


def _last(
    old: np.ndarray, old_step: np.ndarray, values: np.ndarray, step: int | np.ndarray, *, known: np.ndarray
) -> np.ndarray:
    """Of the old values (u,) and those that came, the ones of the larger step, of equal steps the larger ones."""
    newer = (old_step < step) | ~known | ((old_step == step) & (values > old))
    return np.where(newer, values, old)


def _weight(count: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Weight (u,) float64 of the mean of `added` values that come after `count` others, as if they came one by one."""
    full = float(COUNT_FULL)
    held = np.minimum(count + added, full)
    weight = added / held
    beyond = count + added > held
    if beyond.any():
        weight = np.where(beyond, 1 - count / held * (1 - 1 / full) ** (count + added - held), weight)
    return weight


def dithered(values: np.ndarray, *, tick: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """float64 (u,) rounded to one of the two nearest float32, up as often as the value is close to the upper one.

    Rounding to nearest would lose every increment below half a unit in the last place: the mean of 30,000 ones and
    30,000 times 1.001 would stay at 1. The threshold is a point of an even lattice over (tick, key), no random number:
    it is the same in every run, and the errors of successive ticks cancel, where random ones would add up.
    """
    threshold = tick.astype(np.uint32) * _STEP_OF_TICK + keys.astype(np.uint32) * _STEP_OF_KEY
    bits = values.view(np.uint64) + (threshold >> np.uint32(32 - _LOST_BITS))
    bits &= np.uint64(2**64 - 2**_LOST_BITS)
    return bits.view(np.float64).astype(np.float32)
