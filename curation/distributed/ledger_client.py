"""One writer's way to the ledger's actors: batches are split, numbered and sent ahead, with a bound on what waits.

`LedgerActor` is the other side; what is promised is said there.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.metrics import Gauge

from curation.addresses import flat_positions, prefix_sums, shard_of
from curation.distributed.gauges import LastingGauges
from curation.distributed.ledger_actor import Columns, LedgerHandles, answers_of, read_shards, take_rows
from curation.distributed.ledger_writes import (
    AbandonedAttempt,
    check_name,
    checked,
    is_count,
)
from curation.ledger import gini, moves, quantiles_from_counts


class _Asked(NamedTuple):
    """A question on its way: which rows went to whom, and the answers to come."""

    name: str
    addresses: np.ndarray
    order: np.ndarray | slice
    references: list[Any]

    def answer(self) -> Columns:
        parts = answers_of(self.references)
        columns: Columns = {}
        for name in parts[0]:
            joined = np.concatenate([part[name] for part in parts])
            columns[name] = np.empty_like(joined)
            columns[name][self.order] = joined
        return columns


class LedgerClient:
    """One writer's way to the ledger. Not for several threads, and a writer's name is of one client at a time.

    `record` and `prefetch` return at once; `read`, `flush` and all else wait for answers. A read sees what this client
    recorded before it; what others recorded, once they have flushed. A write that an actor refused is raised by the
    next `record` or `flush`, whose own work is then not begun.
    """

    def __init__(
        self, handles: LedgerHandles, *, writer: str, attempt: int, max_in_flight: int = 8, timeout_s: float = 600.0
    ):
        """At most `max_in_flight` writes to each actor are unacknowledged, each for at most `timeout_s`."""
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight}")
        self._actors, self._specs, self._writer, self._attempt = handles.actors, handles.specs, writer, attempt
        self._max_in_flight, self._timeout_s = max_in_flight, timeout_s
        sizes, owners = read_shards(handles.folder)
        self._offsets = prefix_sums(sizes)
        self._owners = owners.astype(np.uint16)  # numpy sorts 16 bits by radix
        self._has_ema = any(spec.statistic == "ema" for spec in handles.specs.values())
        self._in_flight = Gauge(
            "curation_ledger_unacknowledged_writes", "Writes that no actor has acknowledged yet.", ("writer",)
        )
        self._in_flight.set_default_tags({"writer": writer})
        self._gauges = LastingGauges()
        self._flights: list[dict[Any, int | None]] = [{} for _ in self._actors]  # reference -> number, None for a skip
        self._firsts: list[int] | None = None
        self._next: list[int] = []
        self._step = 0
        self._failed: list[BaseException] = []
        self._asked: list[_Asked] = []

    # Writing.

    def open(self) -> None:
        """Announce this writer to the actors; `record` does it if nobody has.

        With an `ema`, every writer opens before any records: only for open writers does a step wait. AbandonedAttempt
        if a later attempt has begun, ValueError if this one has not.
        """
        if self._firsts is None:
            self._firsts = self._all("open", self._writer, self._attempt)
            self._next = list(self._firsts)

    def record(
        self, name: str | None, addresses: Any, values: Any, *, step: int, used: np.ndarray | None = None
    ) -> None:
        """Send scores `values` (n,) of `addresses` (n,), and one use more of each of `used` (m,).

        The scores may be none (`name` None). ValueError, KeyError if any actor would refuse its part: then nothing is
        sent. TimeoutError if an actor is silent for `timeout_s`.
        """
        write = checked(self._specs, self._offsets, step=step, name=name, addresses=addresses, values=values, used=used)
        if step < self._step:
            raise ValueError(f"a writer's steps never decrease: {self._writer!r} was at step {self._step}, now {step}")
        self.open()
        order, bounds = self._split(write.addresses)
        addresses, values = write.addresses[order], write.values[order]
        use_order, use_bounds = self._split(write.used)
        uses = write.used[use_order]
        parts: dict[int, dict[str, Any]] = {}
        for index, (rows, use_rows) in enumerate(zip(bounds, use_bounds, strict=True)):
            # An actor without rows must hear of the step all the same, for an ema waits until all have gone beyond it.
            if rows.stop > rows.start or use_rows.stop > use_rows.start or self._has_ema:
                columns = {"addresses": addresses[rows], "values": values[rows], "used": uses[use_rows]}
                parts[index] = {"attempt": self._attempt, "step": write.step, "name": write.name, **columns}
        for index in range(len(self._actors)):
            self._settle(index, leave=self._max_in_flight - 1 if index in parts else self._max_in_flight)
        self._raise_failed()
        self._step = write.step
        for index, part in parts.items():
            number = self._next[index]
            self._next[index] += 1
            self._flights[index][self._actors[index].write.remote(self._writer, number, part)] = number
        self._tell_in_flight()

    def flush(self) -> None:
        """Return once all that was recorded is acknowledged and applied: a read, by anyone, sees it.

        An `ema` is applied once every open writer has flushed at the step, or gone beyond it; so all writers flush, and
        meet, before one of them reads.
        """
        self._settle_all()
        if self._has_ema and self._firsts is not None:
            calls = zip(self._actors, self._next, strict=True)
            answers_of([actor.call.remote("flush", self._writer, number, self._attempt) for actor, number in calls])

    def close(self) -> None:
        """Wait until all that was recorded is acknowledged, and go: nothing waits for this writer any longer."""
        self._settle_all()
        if self._firsts is not None:
            calls = zip(self._actors, self._firsts, strict=True)
            answers_of([actor.call.remote("close", self._writer, self._attempt, first) for actor, first in calls])
            self._firsts = None

    @property
    def in_flight(self) -> list[int]:
        """Writes to each actor that are unacknowledged, as far as this client has looked."""
        return [len(flight) for flight in self._flights]

    def _settle_all(self) -> None:
        while any(self._flights):  # a refused write is followed by its skip
            for index in range(len(self._actors)):
                self._settle(index, leave=0)
        self._tell_in_flight()
        self._raise_failed()

    def _tell_in_flight(self) -> None:
        self._gauges.set(self._in_flight, sum(self.in_flight))

    def _settle(self, index: int, *, leave: int) -> None:
        """Take what one actor has acknowledged, and wait until at most `leave` of its writes are unacknowledged."""
        flight = self._flights[index]
        if not flight:
            return
        surplus = len(flight) - leave
        if surplus > 0:
            done, _ = ray.wait(list(flight), num_returns=surplus, timeout=self._timeout_s)
            if len(done) < surplus:
                raise TimeoutError(
                    f"ledger actor {index} acknowledged {len(done)} of {surplus} writes in {self._timeout_s:g} s"
                )
        done, _ = ray.wait(list(flight), num_returns=len(flight), timeout=0)
        for reference in done:
            number = flight.pop(reference)
            try:
                ray.get(reference)
            except RayTaskError as error:
                self._failed.append(cast(BaseException, error.cause))
                if number is not None and not isinstance(error.cause, AbandonedAttempt):
                    skip = self._actors[index].call.remote("skip", self._writer, number, self._attempt)
                    flight[skip] = None

    def _raise_failed(self) -> None:
        if self._failed:
            first, *others = self._failed
            self._failed = []
            for other in others:
                first.add_note(f"refused too: {other!r}")
            raise first

    # Reading.

    def prefetch(self, name: str, addresses: Any) -> None:
        """Ask now for what `read` of the same name and addresses will return: the statistics as they are by then."""
        self._asked = [*self._asked, self._ask_rows(name, addresses)][-self._max_in_flight :]

    def read(self, name: str, addresses: Any) -> Columns:
        """`Ledger.read` over all actors: columns (n,) in the order of the addresses (n,).

        ValueError on an unknown name, KeyError that names the first address which is not in the pool.
        """
        for at, asked in enumerate(self._asked):
            if asked.name == name and np.array_equal(asked.addresses, addresses):
                return self._asked.pop(at).answer()
        return self._ask_rows(name, addresses).answer()

    def _ask_rows(self, name: str, addresses: Any) -> _Asked:
        check_name(self._specs, name)
        addresses = np.array(addresses, np.int64)  # a copy: the caller may reuse its array before it reads
        flat_positions(addresses, self._offsets)
        order, bounds = self._split(addresses)
        ordered = addresses[order]
        references = [
            actor.ask.remote("read", name, ordered[rows])
            for actor, rows in zip(self._actors, bounds, strict=True)
            if rows.stop > rows.start
        ]
        return _Asked(name, addresses, order, references or [self._actors[0].ask.remote("read", name, addresses)])

    def _split(self, addresses: np.ndarray) -> tuple[np.ndarray | slice, list[slice]]:
        """The order (n,) that puts the rows of each actor together, and each actor's rows in it."""
        if len(self._actors) == 1:
            return slice(None), [slice(0, len(addresses))]
        owners = self._owners[shard_of(addresses)]
        ends = np.cumsum(np.bincount(owners, minlength=len(self._actors))).tolist()
        return np.argsort(owners, kind="stable"), [slice(*bounds) for bounds in zip([0, *ends], ends, strict=False)]

    # Snapshots.

    def snapshot(self, tag: str) -> None:
        """Save the whole ledger under `tag`. Other writers flush first, and write nothing until it returns."""
        self.flush()
        call = secrets.token_hex(8)
        answers_of([actor.snapshot.remote(tag, self._attempt, call) for actor in self._actors])

    @staticmethod
    def restore(handles: LedgerHandles, tag: str | None, attempt: int | None = None) -> int:
        """Every actor goes back to exactly `tag`, or to empty for None; the number of the attempt that begins there.

        Without `attempt` it is the next one. Earlier attempts are refused from now on, whatever they still have on
        their way. ValueError if not every actor has the tag, of one and the same `snapshot`; then none goes back.
        AbandonedAttempt if a later attempt has begun. What fails in the middle is repeated, or begun with another tag.
        """
        actors = handles.actors
        if tag is not None and len(set(answers_of([actor.call.remote("call_of", tag) for actor in actors]))) > 1:
            raise ValueError(
                f"snapshot {tag!r} is of different moments in the actors: it was interrupted, take another"
            )
        begun = handles.attempt() + 1 if attempt is None else attempt
        answers_of([actor.call.remote("restore", tag, begun) for actor in actors])
        return begun

    def forget(self, tags: Sequence[str]) -> None:
        """Delete snapshots that no checkpoint needs any more."""
        self._all("forget", list(tags))

    # Statistics of the whole pool.

    def known(self, name: str) -> int:
        """Samples that have a score."""
        return sum(self._each("known", name))

    def saturated(self) -> dict[str, int]:
        """Samples whose 16-bit count is full: {"usage": n, NAME: n}."""
        parts = self._each("saturated")
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def histogram(self, name: str, edges: Any) -> np.ndarray:
        """`Ledger.histogram` over all actors."""
        return np.sum(self._each("histogram", name, edges), axis=0)

    def quantiles(self, name: str, q: Any) -> np.ndarray:
        """`Ledger.quantiles` over all actors: exact."""
        return quantiles_from_counts(
            lambda prefix: np.sum(self._each("quantile_counts", name, prefix=prefix), axis=0), q
        )

    def usage_histogram(self) -> np.ndarray:
        """Samples (65536,) int64 by usage count."""
        return np.sum(self._each("usage_histogram"), axis=0)

    def gini(self) -> float:
        """Gini coefficient of usage in [0, 1]."""
        return gini(self.usage_histogram())

    # A shard that was retired.

    def carry_over(
        self, old_uids: np.ndarray, old_addresses: np.ndarray, new_uids: np.ndarray, new_addresses: np.ndarray
    ) -> tuple[int, int]:
        """Move the statistics of retired samples to where their uids (n, 2) uint64 live now: (moved, dropped) samples.

        All old addresses are untouched afterwards; a uid without a new place is dropped and counted. The same call once
        more, after a crash in the middle or not, does what is left and returns the same. ValueError that names the
        first new address which has statistics of its own; then nothing has moved.
        """
        self.flush()
        old_addresses = np.asarray(old_addresses, np.int64)
        source, target, num_dropped = moves(old_uids, old_addresses, new_uids, new_addresses)
        num_moved = len(source)
        key = hashlib.sha256(b"".join(array.tobytes() for array in (source, target, old_addresses))).hexdigest()[:32]
        state = self._export(source)
        touched = np.any([column > 0 for name, column in state.items() if is_count(name)], axis=0)
        target, state = target[touched], {name: column[touched] for name, column in state.items()}
        self._by_owner("check_adopt", target, lambda rows: (key, target[rows]))
        self._by_owner("adopt", target, lambda rows: (key, self._attempt, target[rows], take_rows(state, rows)))
        # Only after every actor has adopted its part: what is dropped cannot be exported a second time.
        self._by_owner("drop", old_addresses, lambda rows: (key, self._attempt, old_addresses[rows]))
        return num_moved, num_dropped

    def _by_owner(self, method: str, addresses: np.ndarray, arguments: Callable[[Any], tuple[Any, ...]]) -> None:
        order, bounds = self._split(addresses)
        rows = [np.arange(len(addresses))[order][part] for part in bounds]
        answers_of(
            [actor.call.remote(method, *arguments(r)) for actor, r in zip(self._actors, rows, strict=True) if len(r)]
        )

    def _export(self, addresses: np.ndarray) -> Columns:
        order, bounds = self._split(addresses)
        ordered = addresses[order]
        asked = [actor.ask.remote("export", ordered[rows]) for actor, rows in zip(self._actors, bounds, strict=True)]
        return _Asked("", addresses, order, asked).answer()

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return answers_of([actor.call.remote(method, *arguments) for actor in self._actors])

    def _each(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        return answers_of([actor.ask.remote(method, *arguments, **named) for actor in self._actors])
