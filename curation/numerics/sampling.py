"""Choosing rows: stable hashes of uids, the exact top of a stream, and Gumbel top-k.

The top `keep` rows of a pool are those at or above a cut in the order (key, tie). The tie is a hash of the uid, so the
order depends neither on machine, process, shard order nor number of workers. `CutSearch` finds the cut by radix select:
each pass over the stream decides 16 of the 96 bits from a histogram, and once the boundary bin is small a last pass
collects its rows. Memory is 0.5 MB for the histogram and 12 bytes per collected row, whatever the pool's size. CLIP
scores of up to about 10**8 rows take two passes, more rows three; six passes are the most, when millions of rows share
one key and one tie.

N rows; K chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

KEY_BITS = 32
TIE_BITS = 64
DIGIT_BITS = 16
NUM_BINS = 1 << DIGIT_BITS

_UID = re.compile(r"[0-9a-fA-F]{32}")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uid_words(uids: Sequence[str]) -> np.ndarray:
    """High and low 64 bits of each uid, (n, 2) uint64. ValueError that names the first which is not 32 hex digits."""
    try:
        data = bytes.fromhex("".join(uids))
    except (ValueError, TypeError):
        data = b""
    # fromhex passes over white space, so the number of bytes is checked beside the length of each string.
    if len(data) != 16 * len(uids) or any(len(uid) != 32 for uid in uids):
        row = next(i for i, uid in enumerate(uids) if not (isinstance(uid, str) and _UID.fullmatch(uid)))
        raise ValueError(f"uid must be 32 hex digits, got {uids[row]!r} in row {row}")
    return np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def uid_strings(words_N2: np.ndarray) -> list[str]:
    """32 lowercase hex digits for each uid; the inverse of `uid_words`."""
    digits = np.asarray(words_N2, dtype=np.uint64).astype(">u8").tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def hash_words(words_N2: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (n,) uint64 of uids, the same on every machine and in every process.

    The finaliser of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), applied to the seed, then the high,
    then the low word. ValueError if `seed` is not in [0, 2**64).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    state = _mix(np.array([seed], dtype=np.uint64))
    for word in (0, 1):
        state = _mix(state ^ words_N2[:, word])
    return state


def hash_uniform(words_N2: np.ndarray, seed: int) -> np.ndarray:
    """Numbers (n,) float64 in [0, 1), multiples of 2**-53, one per uid: noise that a re-run or a worker repeats."""
    return (hash_words(words_N2, seed) >> np.uint64(11)) * 2.0**-53


def tie_hash(words_N2: np.ndarray) -> np.ndarray:
    """Ties (n,) uint64: the order among rows of equal key, the same in every run."""
    return hash_words(words_N2, seed=0)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def order_bits(keys: np.ndarray) -> np.ndarray:
    """Integers (n,) uint32 in the order of the float32 keys (n,): NaN is 0, below -inf; -0.0 equals +0.0.

    ValueError if the keys are not float32: rounding wider ones here would merge rows that their owner told apart.
    """
    if keys.dtype != np.float32:
        raise ValueError(f"keys must be float32, got {keys.dtype}")
    bits = (keys + np.float32(0)).view(np.uint32)  # adding 0 turns -0.0 into +0.0
    sign = np.uint32(1 << 31)
    ordered = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(keys), np.uint32(0), ordered)


def exact_top(keys: np.ndarray, ties: np.ndarray, keep: int) -> np.ndarray:
    """Indices (keep,) int64 of the largest rows by (key, tie), largest first; of rows equal in both, the earlier first.

    ValueError if `keep` is not in [0, n].
    """
    if not 0 <= keep <= len(keys):
        raise ValueError(f"keep must be in [0, {len(keys)}], got {keep}")
    return np.lexsort((~ties, ~order_bits(keys)))[:keep]


class Cut(NamedTuple):
    """A row is kept if (order bits of its key, tie) >= (key_bits, tie)."""

    key_bits: int
    tie: int


KEEP_ALL = Cut(key_bits=0, tie=0)
KEEP_NONE = Cut(key_bits=1 << KEY_BITS, tie=0)
"""One above the largest key."""


def kept(cut: Cut, bits: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Which rows the cut keeps, (n,) bool."""
    return (bits > cut.key_bits) | ((bits == cut.key_bits) & (ties >= cut.tie))


class Pass(NamedTuple):
    """What a worker needs to know for one pass over the stream; small, and the same for all workers."""

    number: int
    """From 1."""
    decided: int
    """How many leading bits of the 96 are known; a multiple of 16."""
    prefix: int
    """Those bits."""
    collect: bool
    """True: return the rows that have the prefix. False: count them by their next 16 bits."""


@dataclass(frozen=True)
class PassCount:
    """What one pass found in part of the stream. Counts of disjoint parts add up, in any order."""

    number: int
    histogram: np.ndarray
    """(65536,) int64 rows by the next 16 bits; (0,) if the pass collects."""
    bits: np.ndarray
    ties: np.ndarray

    def __add__(self, other: PassCount) -> PassCount:
        assert self.number == other.number, f"counts of pass {self.number} and pass {other.number} do not add up"
        return PassCount(
            number=self.number,
            histogram=self.histogram + other.histogram,
            bits=np.concatenate([self.bits, other.bits]),
            ties=np.concatenate([self.ties, other.ties]),
        )


def count_pass(this_pass: Pass, bits: np.ndarray, ties: np.ndarray) -> PassCount:
    """What `this_pass` finds in one block of rows: order bits (n,) uint32, ties (n,) uint64."""
    _, decided, prefix, collect = this_pass
    if decided <= KEY_BITS:
        inside = slice(None) if decided == 0 else (bits >> np.uint32(KEY_BITS - decided)) == prefix
    else:
        undecided = KEY_BITS + TIE_BITS - decided
        key_bits, tie_prefix = prefix >> (decided - KEY_BITS), prefix & ((1 << (decided - KEY_BITS)) - 1)
        inside = (bits == key_bits) & ((ties >> np.uint64(undecided)) == tie_prefix)
    bits, ties = bits[inside], ties[inside]
    if collect:
        return PassCount(this_pass.number, histogram=np.zeros(0, np.int64), bits=bits, ties=ties)
    if decided < KEY_BITS:
        digits = bits >> np.uint32(KEY_BITS - decided - DIGIT_BITS)
    else:
        digits = ties >> np.uint64(KEY_BITS + TIE_BITS - decided - DIGIT_BITS)
    digits = (digits & digits.dtype.type(NUM_BINS - 1)).astype(np.int64)
    histogram = np.bincount(digits, minlength=NUM_BINS).astype(np.int64)
    return PassCount(this_pass.number, histogram=histogram, bits=bits[:0], ties=ties[:0])


class CutSearch:
    """Finds the cut that keeps exactly the top `keep` rows of a stream, which is replayed once per pass.

        search = CutSearch(keep)
        while not search.done:
            for bits, ties in stream():
                search.add(bits, ties)
            search.end_pass()
        mask = kept(search.cut, bits, ties)

    Several workers: send `search.current_pass` to each, let it sum `count_pass` over its blocks, and `merge` the sums.

    Rows that agree with the cut in key and tie cannot be told apart and are all kept; `surplus` is how many that is
    above `keep`. They are repeats of one uid, which the caller folds anyway, or a collision of two uids in 64 bits
    within one key at the cut, which in a pool of 10**10 rows of one and the same key has a chance of about 10**-9.
    """

    def __init__(self, keep: int, *, collect_limit: int = 1_000_000) -> None:
        """ValueError if `keep` is negative or `collect_limit` (rows, 12 bytes each) is below 1."""
        if keep < 0:
            raise ValueError(f"keep must be at least 0, got {keep}")
        if collect_limit < 1:
            raise ValueError(f"collect_limit must be at least 1, got {collect_limit}")
        self.current_pass = Pass(number=1, decided=0, prefix=0, collect=False)
        self.surplus = 0
        self._collect_limit = collect_limit
        self._wanted = keep  # how many of the rows that have the prefix are to be kept
        self._inside: int | None = None  # how many rows have the prefix; None until the first pass has ended
        self._counts: list[PassCount] = []
        self._cut: Cut | None = KEEP_NONE if keep == 0 else None

    @property
    def done(self) -> bool:
        """True once the cut is known; at once for keep=0."""
        return self._cut is not None

    @property
    def cut(self) -> Cut:
        """The cut. RuntimeError while it is not known."""
        if self._cut is None:
            raise RuntimeError(f"the cut is not known yet: pass {self.current_pass.number} has not ended")
        return self._cut

    def add(self, bits: np.ndarray, ties: np.ndarray) -> None:
        """One block of the current pass: order bits (n,) uint32, ties (n,) uint64."""
        self.merge(count_pass(self.current_pass, bits, ties))

    def merge(self, count: PassCount) -> None:
        """What a worker found in its part of the current pass. ValueError if it is from another pass."""
        if self.done or count.number != self.current_pass.number:
            expected = "the search is done" if self.done else f"this is pass {self.current_pass.number}"
            raise ValueError(f"a count of pass {count.number} came, but {expected}")
        # Histograms are folded at once, so memory does not grow; collected rows wait, so no block is copied twice.
        if self._counts and not self.current_pass.collect:
            self._counts = [self._counts[0] + count]
        else:
            self._counts.append(count)

    def end_pass(self) -> None:
        """Takes note that the whole stream went by. RuntimeError if it was not the stream of the passes before."""
        counts, self._counts = self._counts, []
        found = sum(int(c.histogram.sum()) + len(c.bits) for c in counts)
        if self._inside is None:
            if found <= self._wanted:
                self._cut = KEEP_ALL
                return
        elif found != self._inside:
            raise RuntimeError(
                f"the stream changed between passes: {self._inside} rows at the cut became {found} "
                f"in pass {self.current_pass.number}"
            )
        if self.current_pass.collect:
            self._finish(np.concatenate([c.bits for c in counts]), np.concatenate([c.ties for c in counts]))
        else:
            self._descend(counts[0].histogram)

    def _descend(self, histogram: np.ndarray) -> None:
        """Fixes the next 16 bits: those of the bin in which the last row to be kept lies."""
        at_or_above = np.cumsum(histogram[::-1])
        from_top = int(np.searchsorted(at_or_above, self._wanted))
        digit = NUM_BINS - 1 - from_top
        self._inside = int(histogram[digit])
        self._wanted -= int(at_or_above[from_top]) - self._inside
        number, decided, prefix, _ = self.current_pass
        decided, prefix = decided + DIGIT_BITS, (prefix << DIGIT_BITS) | digit
        undecided = KEY_BITS + TIE_BITS - decided
        if self._wanted == self._inside or undecided == 0:
            lowest = prefix << undecided
            self._cut = Cut(key_bits=lowest >> TIE_BITS, tie=lowest & ((1 << TIE_BITS) - 1))
            self.surplus = self._inside - self._wanted
        else:
            self.current_pass = Pass(number + 1, decided, prefix, collect=self._inside <= self._collect_limit)

    def _finish(self, bits: np.ndarray, ties: np.ndarray) -> None:
        last = np.lexsort((ties, bits))[-self._wanted]
        self._cut = Cut(key_bits=int(bits[last]), tie=int(ties[last]))
        self.surplus = int(kept(self._cut, bits, ties).sum()) - self._wanted


def gumbel_top_k(logits: Tensor, k: int, rng: Generator) -> Tensor:
    """Indices (..., k) int64 of rows drawn one after the other without replacement, each with p ~ exp(logit).

    Kool et al. 2019 (arXiv:1903.06059), Sec. 2.2: the k largest of logit + Gumbel noise, in the order of the draws.
    Logits (..., n); leading axes are independent draws. Computed in float64, where the noise has no ties to speak of.
    ValueError if a logit is NaN or +inf, or if fewer than k of them are above -inf, so have a chance at all.
    """
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ValueError("logits must be finite or -inf, got NaN or +inf")
    possible = int(torch.isfinite(logits).sum(dim=-1).min()) if logits.numel() else logits.shape[-1]
    if not 0 <= k <= possible:
        raise ValueError(f"k must be in [0, {possible}], the rows with a logit above -inf, got {k}")
    exponential = torch.empty(logits.shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng)
    # -log of a standard exponential is a standard Gumbel; the clamp keeps an underflow to 0 from becoming +inf.
    gumbel = -exponential.clamp_min(torch.finfo(torch.float64).tiny).log()
    return torch.topk(logits.to(rng.device, torch.float64) + gumbel, k, dim=-1).indices.to(logits.device)
