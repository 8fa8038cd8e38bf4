"""What a write to a ledger carries, checked before it is sent and before it is logged; and what a writer has written.

n scores, m uses.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from curation.addresses import flat_positions
from curation.ledger import LedgerSpec

SESSION = 1 << 32
"""A writer that opens again begins at the next multiple of this, so late writes of its former life are told apart."""
MAX_STEP = (1 << 32) - 1


class AbandonedAttempt(RuntimeError):
    """The call comes from an attempt, or a writer's former life, that has been given up. Nothing was done."""


class Write(NamedTuple):
    """What one write carries, checked; `name` is None if there are no scores."""

    step: int
    name: str | None
    addresses: np.ndarray
    values: np.ndarray
    used: np.ndarray

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The columns by name: addresses (n,) int64, values (n,) float32, used (m,) int64."""
        return {"addresses": self.addresses, "values": self.values, "used": self.used}


def checked(
    specs: Mapping[str, LedgerSpec],
    offsets: np.ndarray,
    *,
    step: int,
    name: str | None,
    addresses: Any,
    values: Any,
    used: Any = None,
) -> Write:
    """The write with arrays of the right types, if a Ledger of these specs and offsets (`prefix_sums`) would take it.

    ValueError for an unknown name (suggests the nearest), a step outside uint32, values that float32 cannot hold (names
    up to five), lengths that differ; KeyError that names the first address which is not in the pool.
    """
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be in [0, {MAX_STEP}], got {step}")
    addresses, used = _as_addresses("addresses", addresses), _as_addresses("used", () if used is None else used)
    with np.errstate(over="ignore"):  # beyond float32 is found below, as infinite
        values = np.asarray(values).astype(np.float32, copy=False)
    if name is None and len(addresses):
        raise ValueError(f"scores without a ledger's name, the ledgers are {sorted(specs)}")
    if name is not None:
        check_name(specs, name)
    if values.shape != addresses.shape:
        raise ValueError(f"values must be of shape {addresses.shape} as the addresses are, got {values.shape}")
    finite = np.isfinite(values)
    if not finite.all():
        wrong = [f"{addresses[row]}:{values[row]}" for row in np.flatnonzero(~finite)[:5]]
        raise ValueError(f"values must be finite in float32, got (address:value) {', '.join(wrong)}")
    for some in (addresses, used):
        if len(some):
            flat_positions(some, offsets)
    return Write(int(step), name, addresses, values, used)


def check_name(specs: Mapping[str, LedgerSpec], name: str) -> None:
    """ValueError that suggests the nearest name if there is no such ledger."""
    if name not in specs:
        nearest = difflib.get_close_matches(name, specs, n=1, cutoff=0.0)
        raise ValueError(f"no ledger is named {name!r}, did you mean {nearest}? There are {sorted(specs)}")


def specs_json(specs: Mapping[str, LedgerSpec]) -> dict[str, Any]:
    """Specs as JSON holds them, to be compared with saved ones."""
    return {name: dataclasses.asdict(spec) for name, spec in sorted(specs.items())}


def is_count(column: str) -> bool:
    """True for the columns of `Ledger.export` that are above zero where a sample has statistics."""
    return column == "usage" or column.endswith(".count")


def _as_addresses(field_name: str, addresses: Any) -> np.ndarray:
    array = np.asarray(addresses)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"{field_name} must be integers of shape (n,), got {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


@dataclass
class WriterState:
    """Which numbers of one writer were applied: all in [first, next), and those of `ahead`, which came too early."""

    first: int
    next: int
    step: int = -1
    """Of the write before `next`; -1 before there is one."""
    is_open: bool = True
    flushed: bool = False
    """It has nothing more of `step` to write."""
    ahead: dict[int, int] = field(default_factory=dict)
    """Number -> step."""

    def has(self, number: int) -> bool:
        """True if that write was applied, or is ahead of its turn."""
        return number < self.next or number in self.ahead

    def steps_around(self, number: int) -> tuple[int, int]:
        """The steps between which the write `number` must lie, because a writer's steps never decrease."""
        lower = [step for other, step in self.ahead.items() if other < number]
        upper = [step for other, step in self.ahead.items() if other > number]
        return max([self.step, *lower]), min([MAX_STEP, *upper])

    @property
    def at_step(self) -> int:
        """It will write of no step below this one."""
        return self.step + 1 if self.flushed else self.step

    def note(self, number: int, step: int) -> None:
        """The write was applied."""
        self.flushed = False
        self.ahead[number] = step
        while self.next in self.ahead:
            self.step = self.ahead.pop(self.next)
            self.next += 1
