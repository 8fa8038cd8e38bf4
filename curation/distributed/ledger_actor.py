"""The ledger behind handles: shards spread over actors by hash, each with its log on disk, and a client that splits.

Two promises. The crash of an actor loses nothing that was acknowledged: Ray starts it again, it recovers from its
folder, and what was on its way is sent once more but counts once. A restart of training calls `restore`: every actor
goes back to exactly that snapshot, and what the abandoned attempt still has on its way is refused.

A client sends without waiting, up to `max_in_flight` writes per actor, and then waits: a slow ledger slows training, it
does not fill memory. One life of a training run, from start or restart to the next, is one attempt:

    handles = start_ledger(output, shard_sizes, {"score": LedgerSpec("ema")}, num_actors=2)        # the driver
    attempt = LedgerClient.restore(handles, tag)                                 # rank 0, which tells the others
    client = LedgerClient(handles, writer=f"rank-{rank}", attempt=attempt)       # each worker
    client.open()                                                                # with an ema: all, before any records
    client.record("score", addresses, values, step=step, used=chosen)            # every step
    client.flush()                                                               # all, and then a barrier, before
    client.snapshot(tag)                                                         # rank 0 takes a snapshot
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.metrics import Counter, Gauge

from curation.addresses import flat_positions, prefix_sums, shard_of
from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.distributed.durable_ledger import (
    AbandonedAttempt,
    DurableLedger,
    check_name,
    checked,
    is_count,
    specs_json,
)
from curation.ledger import LedgerSpec, gini, moves, quantiles_from_counts

METRICS_EVERY_S = 1.0
CALLS = frozenset({"open", "close", "skip", "flush", "restore", "forget", "call_of", "check_adopt", "adopt", "drop"})
"""What `LedgerActor.call` passes on to its DurableLedger."""
QUESTIONS = frozenset({"read", "known", "saturated", "histogram", "quantile_counts", "usage_histogram", "export"})
"""What `LedgerActor.ask` passes on to its Ledger."""

Columns = dict[str, np.ndarray]


def owner_of(shard_numbers: np.ndarray, num_actors: int) -> np.ndarray:
    """Which actor (n,) int64 in [0, num_actors) holds each shard: a hash of its number, the same for ever."""
    # Imported here because torch comes with it: an actor reads its shards from a file, and restarts 2 s sooner.
    from curation.numerics.sampling import hash_words

    numbers = np.asarray(shard_numbers, np.uint64)
    hashes = hash_words(np.stack([np.zeros_like(numbers), numbers], axis=1), seed=0)
    return (hashes % np.uint64(num_actors)).astype(np.int64)


class LedgerActor:
    """The DurableLedger of the shards that one actor owns, with metrics. Made by `start_ledger`; one call at a time."""

    def __init__(self, folder: str, index: int, options: Mapping[str, Any]):
        """FileNotFoundError if this node does not see the ledger's folder: an empty ledger would take its place."""
        plan = manifest.read(storage.join(folder, "ledger.json"))
        sizes, owners = _read_shards(folder)
        sizes = np.where(owners == index, sizes, 0)
        specs = {name: LedgerSpec(**spec) for name, spec in plan["specs"].items()}
        self._durable = DurableLedger(storage.join(folder, f"actor-{index:05d}"), sizes, specs, **options)
        keys, tags = ("ledger_actor",), {"ledger_actor": str(index)}
        self._updates = Counter("curation_ledger_updates", "Scores taken in; its rate is updates/s.", keys)
        self._known = Gauge("curation_ledger_known", "Samples that have a score.", (*keys, "ledger"))
        self._bytes = Gauge("curation_ledger_bytes", "Bytes of all columns.", keys)
        self._log_bytes = Gauge("curation_ledger_log_bytes", "Bytes that a recovery would replay.", keys)
        self._waiting = Gauge("curation_ledger_waiting_bytes", "Bytes of ema writes that wait for a writer.", keys)
        self._stall = Gauge(
            "curation_ledger_snapshot_stall_s", "Seconds for which the last snapshot held up writes.", keys
        )
        for metric in (self._updates, self._known, self._bytes, self._log_bytes, self._waiting, self._stall):
            metric.set_default_tags(tags)
        self._next_metrics = 0.0

    def write(self, writer: str, number: int, write: Mapping[str, Any]) -> bool:
        """`DurableLedger.write`; `write` holds its keyword arguments, so that all arrays travel as one object."""
        applied = self._durable.write(writer, number, **write)
        if applied and len(write["addresses"]):
            self._updates.inc(len(write["addresses"]))
        if time.monotonic() >= self._next_metrics:
            self._tell_metrics()
        return applied

    def snapshot(self, tag: str, attempt: int, call: str) -> None:
        """`DurableLedger.snapshot`."""
        begun = time.monotonic()
        self._durable.snapshot(tag, attempt, call=call)
        self._stall.set(time.monotonic() - begun)
        self._tell_metrics()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method of DurableLedger returns; one of CALLS."""
        assert method in CALLS, method
        return getattr(self._durable, method)(*arguments)

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What the method of Ledger returns; one of QUESTIONS."""
        assert method in QUESTIONS, method
        return getattr(self._durable.ledger, method)(*arguments, **named)

    def state(self) -> dict[str, Any]:
        """Its process, attempt, tags and sizes."""
        durable = self._durable
        return {
            "pid": os.getpid(),
            "attempt": durable.attempt,
            "tags": durable.tags,
            "num_samples": durable.ledger.num_samples,
            "num_bytes": durable.ledger.num_bytes,
            "log_bytes": durable.log_bytes,
            "waiting_bytes": durable.waiting_bytes,
        }

    def _tell_metrics(self) -> None:
        self._next_metrics = time.monotonic() + METRICS_EVERY_S
        self._bytes.set(self._durable.ledger.num_bytes)
        self._log_bytes.set(self._durable.log_bytes)
        self._waiting.set(self._durable.waiting_bytes)
        for name in self._durable.ledger.names:
            self._known.set(self._durable.ledger.known(name), {"ledger": name})


@dataclass(frozen=True)
class LedgerHandles:
    """The running ledger: small, and may be sent to any worker. Its state is in `folder`, not in the actors."""

    folder: str
    actors: tuple[Any, ...]
    specs: Mapping[str, LedgerSpec]

    def attempt(self) -> int:
        """The latest attempt of any actor."""
        return max(state["attempt"] for state in self.states())

    def states(self) -> list[dict[str, Any]]:
        """`LedgerActor.state` of each actor."""
        return _get([actor.state.remote() for actor in self.actors])

    def close(self) -> None:
        """End the actors. What they acknowledged stays, and `start_ledger` goes on from it."""
        for actor in self.actors:
            ray.kill(actor)


def start_ledger(
    output: str,
    shard_sizes: np.ndarray,
    specs: Mapping[str, LedgerSpec],
    *,
    num_actors: int,
    max_log_bytes: int = 2 << 30,
    max_waiting_bytes: int = 256 << 20,
    fsync: bool = False,
) -> LedgerHandles:
    """Start the ledger of a run's folder, or go on with the one there; all actors have recovered on return.

    `shard_sizes` (S,): rows of each shard by its number; more shards may come at the end later, and no other change.
    `output` must be seen by every node. The actors end when the last handle does, or with `close`.
    ValueError that names the field if `num_actors`, `specs` or `shard_sizes` differ from what the folder holds.
    """
    if not 1 <= num_actors < 1 << 16:
        raise ValueError(f"num_actors must be in [1, 65536), got {num_actors}")
    folder = storage.join(storage.absolute(output), "ledger")
    _write_plan(folder, np.asarray(shard_sizes, np.int64), specs, num_actors)
    options = {"max_log_bytes": max_log_bytes, "max_waiting_bytes": max_waiting_bytes, "fsync": fsync}
    # No CPU: an actor that holds a fraction of a node's CPUs can starve the tasks that feed it.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(LedgerActor)
    started = tuple(cast(Any, actor).remote(folder, index, options) for index in range(num_actors))
    handles = LedgerHandles(folder, started, dict(specs))
    handles.states()
    return handles


def _write_plan(folder: str, sizes: np.ndarray, specs: Mapping[str, LedgerSpec], num_actors: int) -> None:
    prefix_sums(sizes)
    url = storage.join(folder, "ledger.json")
    plan = {"format_version": FORMAT_VERSION, "num_actors": num_actors, "specs": specs_json(specs)}
    if storage.exists(url):
        former = manifest.read(url)
        for name in ("num_actors", "specs"):
            if former[name] != plan[name]:
                raise ValueError(f"{name} of a ledger cannot change: {folder} has {former[name]}, now {plan[name]}")
        known, _ = _read_shards(folder)
        if len(sizes) < len(known):
            raise ValueError(f"shard_sizes: {folder} has {len(known)} shards, now {len(sizes)}")
        if len(shards := np.flatnonzero(sizes[: len(known)] != known)):
            shard = int(shards[0])
            raise ValueError(f"shard_sizes: shard {shard} had {known[shard]} rows, now {sizes[shard]}")
        if len(sizes) == len(known):
            return
    with storage.write_atomic(storage.join(folder, "shards.npy")) as file:
        np.save(file, np.stack([sizes, owner_of(np.arange(len(sizes)), num_actors)]), allow_pickle=False)
    storage.write_bytes(url, json.dumps(plan, indent=1).encode())


def _read_shards(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (S,) and owner (S,) of each shard, int64."""
    data = storage.read_bytes(storage.join(folder, "shards.npy"))
    sizes, owners = np.load(io.BytesIO(data), allow_pickle=False)
    return sizes, owners


def _take(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _get(references: Sequence[Any]) -> list[Any]:
    """The answers of several actors; an error in one of them as it was raised there."""
    try:
        return ray.get(list(references))
    except RayTaskError as error:
        raise cast(BaseException, error.cause) from None


class _Asked(NamedTuple):
    """A question on its way: which rows went to whom, and the answers to come."""

    name: str
    addresses: np.ndarray
    order: np.ndarray | slice
    references: list[Any]

    def answer(self) -> Columns:
        parts = _get(self.references)
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
        sizes, owners = _read_shards(handles.folder)
        self._offsets = prefix_sums(sizes)
        self._owners = owners.astype(np.uint16)  # numpy sorts 16 bits by radix
        self._has_ema = any(spec.statistic == "ema" for spec in handles.specs.values())
        self._in_flight = Gauge(
            "curation_ledger_unacknowledged_writes", "Writes that no actor has acknowledged yet.", ("writer",)
        )
        self._in_flight.set_default_tags({"writer": writer})
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
        self._in_flight.set(sum(map(len, self._flights)))

    def flush(self) -> None:
        """Return once all that was recorded is acknowledged and applied: a read, by anyone, sees it.

        An `ema` is applied once every open writer has flushed at the step, or gone beyond it; so all writers flush, and
        meet, before one of them reads.
        """
        self._settle_all()
        if self._has_ema and self._firsts is not None:
            calls = zip(self._actors, self._next, strict=True)
            _get([actor.call.remote("flush", self._writer, number, self._attempt) for actor, number in calls])

    def close(self) -> None:
        """Wait until all that was recorded is acknowledged, and go: nothing waits for this writer any longer."""
        self._settle_all()
        if self._firsts is not None:
            calls = zip(self._actors, self._firsts, strict=True)
            _get([actor.call.remote("close", self._writer, self._attempt, first) for actor, first in calls])
            self._firsts = None

    @property
    def in_flight(self) -> list[int]:
        """Writes to each actor that are unacknowledged, as far as this client has looked."""
        return [len(flight) for flight in self._flights]

    def _settle_all(self) -> None:
        while any(self._flights):  # a refused write is followed by its skip
            for index in range(len(self._actors)):
                self._settle(index, leave=0)
        self._raise_failed()

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
        _get([actor.snapshot.remote(tag, self._attempt, call) for actor in self._actors])

    @staticmethod
    def restore(handles: LedgerHandles, tag: str | None, attempt: int | None = None) -> int:
        """Every actor goes back to exactly `tag`, or to empty for None; the number of the attempt that begins there.

        Without `attempt` it is the next one. Earlier attempts are refused from now on, whatever they still have on
        their way. ValueError if not every actor has the tag, of one and the same `snapshot`; then none goes back.
        AbandonedAttempt if a later attempt has begun. What fails in the middle is repeated, or begun with another tag.
        """
        actors = handles.actors
        if tag is not None and len(set(_get([actor.call.remote("call_of", tag) for actor in actors]))) > 1:
            raise ValueError(
                f"snapshot {tag!r} is of different moments in the actors: it was interrupted, take another"
            )
        begun = handles.attempt() + 1 if attempt is None else attempt
        _get([actor.call.remote("restore", tag, begun) for actor in actors])
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
        self._by_owner("adopt", target, lambda rows: (key, self._attempt, target[rows], _take(state, rows)))
        # Only after every actor has adopted its part: what is dropped cannot be exported a second time.
        self._by_owner("drop", old_addresses, lambda rows: (key, self._attempt, old_addresses[rows]))
        return num_moved, num_dropped

    def _by_owner(self, method: str, addresses: np.ndarray, arguments: Callable[[Any], tuple[Any, ...]]) -> None:
        order, bounds = self._split(addresses)
        rows = [np.arange(len(addresses))[order][part] for part in bounds]
        _get([actor.call.remote(method, *arguments(r)) for actor, r in zip(self._actors, rows, strict=True) if len(r)])

    def _export(self, addresses: np.ndarray) -> Columns:
        order, bounds = self._split(addresses)
        ordered = addresses[order]
        asked = [actor.ask.remote("export", ordered[rows]) for actor, rows in zip(self._actors, bounds, strict=True)]
        return _Asked("", addresses, order, asked).answer()

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return _get([actor.call.remote(method, *arguments) for actor in self._actors])

    def _each(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        return _get([actor.ask.remote(method, *arguments, **named) for actor in self._actors])
