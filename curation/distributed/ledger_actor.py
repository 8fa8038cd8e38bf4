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

import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.metrics import Counter, Gauge

from curation.addresses import prefix_sums
from curation.columns import FORMAT_VERSION
from curation.data import manifest, storage
from curation.distributed.durable_ledger import DurableLedger
from curation.distributed.gauges import LastingGauges
from curation.distributed.ledger_writes import specs_json
from curation.ledger import LedgerSpec

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
        sizes, owners = read_shards(folder)
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
        self._gauges = LastingGauges()  # a ledger that nobody writes to is still as large
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
        self._gauges.set(self._stall, time.monotonic() - begun)
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
        self._gauges.set(self._bytes, self._durable.ledger.num_bytes)
        self._gauges.set(self._log_bytes, self._durable.log_bytes)
        self._gauges.set(self._waiting, self._durable.waiting_bytes)
        for name in self._durable.ledger.names:
            self._gauges.set(self._known, self._durable.ledger.known(name), {"ledger": name})


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
        return answers_of([actor.state.remote() for actor in self.actors])

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
        known, _ = read_shards(folder)
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


def read_shards(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (S,) and owner (S,) of each shard, int64."""
    data = storage.read_bytes(storage.join(folder, "shards.npy"))
    sizes, owners = np.load(io.BytesIO(data), allow_pickle=False)
    return sizes, owners


def take_rows(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def answers_of(references: Sequence[Any]) -> list[Any]:
    """The answers of several actors; an error in one of them as it was raised there."""
    try:
        return ray.get(list(references))
    except RayTaskError as error:
        raise cast(BaseException, error.cause) from None
