"""What a ledger's log makes: the statistics, how far each writer is, and the ema writes that wait.

A state machine without disk or clock: each change is a function of the state and the record alone, so a replay of the
records does what was done the first time.

An `ema` depends on the order of its values, so its writes wait until every open writer has gone beyond their step, or
flushed at it; then all of one step are put together, sorted, and applied once: the result does not depend on which
writer sent what when. Waiting writes are in the log like all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.distributed.ledger_log import Arrays
from curation.distributed.ledger_writes import MAX_STEP, SESSION, AbandonedAttempt, Write, WriterState
from curation.ledger import Ledger, LedgerSpec

_NOTHING_SAVED: Mapping[str, Any] = {"writers": {}, "applied_step": {}, "moves": []}


class LedgerState:
    """A Ledger and what its next record depends on. It changes by `apply` alone."""

    def __init__(
        self, ledger: Ledger, specs: Mapping[str, LedgerSpec], *, saved: Mapping[str, Any] = _NOTHING_SAVED
    ) -> None:
        """`saved` is what `saved()` returned, through JSON; what waited then comes as `waiting_records()`."""
        self.ledger, self._specs = ledger, specs
        self.writers = {
            name: WriterState(**{**one, "ahead": {int(number): step for number, step in one["ahead"].items()}})
            for name, one in saved["writers"].items()
        }
        self.applied_step: dict[str, int] = dict(saved["applied_step"])
        self.moves: list[str] = list(saved["moves"])
        self.waiting: dict[tuple[int, str], list[tuple[np.ndarray, np.ndarray]]] = {}
        """(step, ledger) -> (addresses, values) of each ema write that is logged and not applied."""

    def saved(self) -> dict[str, Any]:
        """What JSON can hold of it: all but the ledger, and what waits."""
        return {
            "writers": {name: dataclasses.asdict(writer) for name, writer in self.writers.items()},
            "applied_step": self.applied_step,
            "moves": self.moves,
        }

    def waiting_records(self) -> list[tuple[Mapping[str, Any], Arrays]]:
        """Records that make wait again what waits."""
        return [
            ({"kind": "wait", "step": step, "name": name}, {"addresses": addresses, "values": values})
            for (step, name), parts in self.waiting.items()
            for addresses, values in parts
        ]

    @property
    def waiting_bytes(self) -> int:
        """Bytes of ema writes that wait for a writer."""
        return sum(array.nbytes for parts in self.waiting.values() for part in parts for array in part)

    # Checks: what is refused changes nothing.

    def writer(self, writer: str, number: int) -> WriterState:
        """The writer whose life `number` is of. AbandonedAttempt if that life is over, ValueError if it is not open."""
        known = self.writers.get(writer)
        if known is None or not known.is_open:
            raise ValueError(f"writer {writer!r} is not open")
        if number < known.first:
            raise AbandonedAttempt(f"write {number} of {writer!r} is from before the writer opened again")
        if number >= known.first + SESSION:
            raise ValueError(f"write {number} of {writer!r} is beyond what it opened, [{known.first}, +{SESSION})")
        return known

    def check_order(self, writer: str, number: int, write: Write, *, max_waiting_bytes: int) -> None:
        """ValueError if steps decrease; RuntimeError if too much waits for a writer that is behind this one."""
        known = self.writers[writer]
        lower, upper = known.steps_around(number)
        if not lower <= write.step <= upper:
            raise ValueError(
                f"a writer's steps never decrease: write {number} of {writer!r} is of step {write.step}, those "
                f"around it are of steps {lower} and {upper}"
            )
        if write.name is None or self._specs[write.name].statistic != "ema" or not len(write.addresses):
            return
        applied = self.applied_step.get(write.name, 0)
        if write.step < applied:
            raise ValueError(f"{write.name!r} is an ema: step {write.step} came after step {applied} had been applied")
        slowest = min((w.at_step, name) for name, w in self.writers.items() if w.is_open)
        if self.waiting_bytes > max_waiting_bytes and known.at_step > slowest[0]:
            raise RuntimeError(
                f"{self.waiting_bytes} bytes of ema writes wait for writer {slowest[1]!r}, which is at step "
                f"{slowest[0]}, {writer!r} at {write.step}: close a writer that has ended"
            )

    # Changes.

    def apply(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Change the state as the record says."""
        kind = meta["kind"]
        if kind == "open":
            self.writers[meta["writer"]] = WriterState(first=meta["first"], next=meta["first"])
        elif kind == "close":
            self.writers[meta["writer"]].is_open = False
            self._apply_below(self._all_beyond())
        elif kind == "write":
            self._apply_write(meta, arrays)
        elif kind == "wait":
            self._wait(meta, arrays)
        elif kind == "flush":
            self.writers[meta["writer"]].flushed = True
            self._apply_below(self._all_beyond())
        elif kind == "apply":
            self._apply_below(MAX_STEP + 1)
        elif kind == "restored":
            self.writers = {}
        elif kind == "adopt":
            state = {name: column for name, column in arrays.items() if name != "addresses"}
            self.ledger.adopt(arrays["addresses"], state)
            for name in self._specs:  # a later write at these addresses must not be of a step before theirs
                latest = int(state[f"{name}.last_step"].max(initial=0))
                self.applied_step[name] = max(self.applied_step.get(name, 0), latest)
            self.moves.append(f"adopt {meta['key']}")
        elif kind == "drop":
            self.ledger.forget(arrays["addresses"])
            self.moves.append(f"drop {meta['key']}")
        else:
            assert kind == "begin", f"no record is of kind {kind!r}"

    def _apply_write(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        step, name = meta["step"], meta["name"]
        self.writers[meta["writer"]].note(meta["number"], step)
        if len(arrays.get("used", ())):
            self.ledger.add_usage(arrays["used"])
        if len(arrays.get("addresses", ())):
            if self._specs[name].statistic == "ema":
                self._wait(meta, arrays)
            else:
                self.ledger.update(name, arrays["addresses"], arrays["values"], step=step)
        self._apply_below(self._all_beyond())

    def _wait(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        parts = self.waiting.setdefault((meta["step"], meta["name"]), [])
        parts.append((arrays["addresses"], arrays["values"]))

    def _all_beyond(self) -> int:
        """No writer will write of a step below this one."""
        return min((writer.at_step for writer in self.writers.values() if writer.is_open), default=MAX_STEP + 1)

    def _apply_below(self, limit: int) -> None:
        """Apply what waits of steps below `limit`: all of one step and ledger at once, in an order of their own."""
        for step, name in sorted(key for key in self.waiting if key[0] < limit):
            addresses, values = map(np.concatenate, zip(*self.waiting.pop((step, name)), strict=True))
            order = np.lexsort((values, addresses))
            self.ledger.update(name, addresses[order], values[order], step=step)
            self.applied_step[name] = max(self.applied_step.get(name, 0), step)
