"""The ledger through its actors: updates/s with the log on, against one actor that holds a dict; reads; snapshots.

Both sides take the same batches, one call after the other with as many on their way, and both are asked for every
sample's count at the end, so that a faster wrong answer fails. The dict is in memory only and forgets with its process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray

from curation.addresses import pack
from curation.distributed.ledger_actor import LedgerHandles, start_ledger
from curation.distributed.ledger_client import LedgerClient
from curation.ledger import LedgerSpec
from jobs.benchmarks.pairs import interleaved, paired_ratio

NAME = "score"
NUM_ACTORS, IN_FLIGHT = 2, 8
BATCH, READ = 65_536, 163_840
ROWS_PER_SHARD = 10_000
TARGET_RATE = 2_000_000


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shards: int
    batches: int
    reads: int


WHOLE, TINY = Size(shards=1_000, batches=60, reads=25), Size(shards=8, batches=3, reads=3)


def through_actors(*, pairs: int, tiny: bool) -> dict[str, Any]:
    """All figures of this benchmark, in a Ray that is running or one of its own."""
    # Imported here because the rival's actor imports this file, and torch comes with it.
    from curation.distributed.resources import cluster

    size = TINY if tiny else WHOLE
    with tempfile.TemporaryDirectory(prefix="curation-bench-") as folder, cluster(num_cpus=1):
        handles = start_ledger(
            folder, np.full(size.shards, ROWS_PER_SHARD), {NAME: LedgerSpec()}, num_actors=NUM_ACTORS
        )
        try:
            figures = race(handles, size, pairs=pairs)
            figures |= reads(handles, size)
            return figures | snapshots(handles)
        finally:
            handles.close()


def race(handles: LedgerHandles, size: Size, *, pairs: int) -> dict[str, Any]:
    """Ours and the dict, in interleaved pairs of fresh batches. RuntimeError if either lost or doubled an update."""
    client = LedgerClient(handles, writer="benchmark", attempt=handles.attempt(), max_in_flight=IN_FLIGHT)
    rival = cast(Any, ray.remote(num_cpus=0)(DictActor)).remote()
    sent: dict[str, list[np.ndarray]] = {"ours": [], "rival": []}

    def timed(side: str, send: Callable[[np.ndarray, np.ndarray, int], None], finish: Callable[[], object]) -> float:
        steps = range(len(sent[side]), len(sent[side]) + size.batches)
        batches = [(step, *_batch(size, BATCH, seed=step)) for step in steps]
        begun = time.perf_counter()
        for step, addresses, values in batches:
            send(addresses, values, step)
        finish()
        sent[side] += [addresses for _, addresses, _ in batches]
        return size.batches * BATCH / (time.perf_counter() - begun)

    def run_ours() -> float:
        return timed("ours", lambda a, v, step: client.record(NAME, a, v, step=step), client.flush)

    def run_rival() -> float:
        flight: deque[Any] = deque()

        def send(addresses: np.ndarray, values: np.ndarray, step: int) -> None:
            if len(flight) == IN_FLIGHT:
                ray.get(flight.popleft())
            flight.append(rival.update.remote(addresses, values, step))

        return timed("rival", send, lambda: ray.get(list(flight)))

    run_ours()  # the first touches the pages
    run_rival()
    figures = interleaved(run_ours, run_rival, pairs=pairs)
    for side, counts_of in (
        ("ours", lambda addresses: client.read(NAME, addresses)["ledger_count"]),
        ("rival", lambda addresses: ray.get(rival.counts.remote(addresses))),
    ):
        addresses, counts = np.unique(np.concatenate(sent[side]), return_counts=True)
        if not np.array_equal(counts_of(addresses), counts):
            raise RuntimeError(f"{side} does not hold the counts that were sent")
    client.close()
    ray.kill(rival)
    ratio = paired_ratio(figures)
    rates = {"ours": [ours for ours, _ in figures], "rival": [theirs for _, theirs in figures]}
    median = statistics.median(rates["ours"])
    outcome = "met" if median >= TARGET_RATE else "short"
    print(f"updates/s through {NUM_ACTORS} actors with a log: {median / 1e6:.1f} million (target 2: {outcome})")
    print(f"updates/s, ours / one actor that holds a dict: {ratio}")
    return {
        "updates_per_s": {**rates, "median": median, "target": TARGET_RATE, "outcome": outcome},
        "updates_ratio": ratio._asdict(),
    }


def reads(handles: LedgerHandles, size: Size) -> dict[str, Any]:
    """Seconds of one step's question: prefetch and read with nothing between, so all of it is waited for."""
    client = LedgerClient(handles, writer="benchmark", attempt=handles.attempt())
    seconds = []
    for seed in range(size.reads):
        addresses, _ = _batch(size, READ, seed=seed)
        begun = time.perf_counter()
        client.prefetch(NAME, addresses)
        client.read(NAME, addresses)
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    print(f"prefetch and read of {READ:,} addresses: {1e3 * median:.1f} ms")
    return {"read": {"addresses": READ, "seconds": seconds, "median_s": median}}


def snapshots(handles: LedgerHandles) -> dict[str, Any]:
    """Seconds to save the whole ledger, and to go back to that."""
    client = LedgerClient(handles, writer="benchmark", attempt=handles.attempt())
    num_bytes = sum(state["num_bytes"] for state in handles.states())
    begun = time.perf_counter()
    client.snapshot("benchmark")
    saved = time.perf_counter()
    LedgerClient.restore(handles, "benchmark")
    restored = time.perf_counter()
    print(f"snapshot of {num_bytes / 1e6:,.0f} MB: {saved - begun:.2f} s, restore: {restored - saved:.2f} s")
    return {"snapshot": {"bytes": num_bytes, "snapshot_s": saved - begun, "restore_s": restored - saved}}


class DictActor:
    """The rival: what one would write first. Last value, count and step of each address in a dict."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, int, int]] = {}

    def update(self, addresses: np.ndarray, values: np.ndarray, step: int) -> None:
        """One batch."""
        known = self._known
        for address, value in zip(addresses.tolist(), values.tolist(), strict=True):
            _, count, _ = known.get(address, (0.0, 0, 0))
            known[address] = (value, count + 1, step)

    def counts(self, addresses: np.ndarray) -> np.ndarray:
        """How often each address came."""
        return np.array([self._known[address][1] for address in addresses.tolist()])


def _batch(size: Size, rows: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shards, row = np.divmod(rng.integers(0, size.shards * ROWS_PER_SHARD, rows), ROWS_PER_SHARD)
    return pack(0, row) + (shards << 20), rng.normal(size=rows).astype(np.float32)
