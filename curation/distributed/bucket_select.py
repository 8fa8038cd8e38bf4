"""A step of a selection that compares rows: the pool is cut into buckets on disk, each is decided by a task.

Four stages, each a run of Ray tasks whose outcome is a file, so that a run that was killed goes on behind what is
there, and memory is that of a few buckets whatever the pool's size:

    sample    rows of a low hash -> k-means -> cutting.npz           (only where the pool is more than one bucket)
    cut       a group of shards -> rows/GROUP.bin, sorted by bucket, and rows/GROUP.json: where each bucket begins
    decide    a run of buckets -> kept/RUN.npy: address and score of the rows that stay
    verdict   all of kept/, sorted by address (data/verdicts.py)

All lies in a folder whose name is the digest of what can change the outcome. When the verdict is there the rows, a copy
of the embeddings, are removed; the verdict stays, so a selection that was made once is not made again.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Generator
from torch.nn import functional as F

from curation.columns import JSON_PREFIX
from curation.data import storage, tables, verdicts
from curation.data.uid_sort import UidSort, splitters
from curation.data.verdicts import KeptRows
from curation.distributed.tasks import ordered
from curation.numerics import bucketing, sampling
from curation.numerics.bucket_quotas import bucket_quotas
from curation.numerics.bucketing import Cutting
from curation.selector import BucketSelector, OutcomeSelector, QuotaSelector, Rows

ROWS_PER_RUN = 50_000
"""Rows of neighbouring buckets that one task decides; a bucket that has more is a run of its own."""
PROGRESS = 0.0
SWEEP = (*(place / 100 for place in range(50, 100)), 0.995, 0.999)
"""Cosines at which it is counted how many rows would fall."""
UNCOMPARED = "uncompared.json"
KEPT_DTYPE = np.dtype([("address", "<i8"), ("score", "<f4")])

Candidates = Callable[[int, frozenset[str]], pa.Table]
"""(shard number, columns) -> those columns of the rows that reach the step, in order of address."""


class Buckets(NamedTuple):
    """Which step is decided, where, and on what; small enough to go to every task."""

    selector: BucketSelector
    folder: str
    seed: int
    candidates: Candidates
    num_buckets: int = 1


def decide(
    selector: BucketSelector,
    *,
    folder: str,
    groups: Sequence[list[int]],
    candidates: Candidates,
    rows: int,
    keep: int | None,
    seed: int,
) -> None:
    """Write the verdict on the `rows` rows that reach the step, unless it is there. `keep` rows stay, or as it says.

    Rows without the vector that is compared do not stay: `without_vector` says how many they were.
    """
    if verdicts.exists(folder):
        return
    buckets = Buckets(selector, folder, seed, candidates)
    if rows > selector.exact_rows:
        buckets = buckets._replace(num_buckets=_cut_finer(buckets, groups, rows))
    sizes_GK = list(ordered(_cut, ((buckets, place, group) for place, group in enumerate(groups))))
    sizes_K = np.sum(sizes_GK, axis=0) if sizes_GK else np.zeros(1, np.int64)
    quotas_K = None
    if isinstance(selector, QuotaSelector):
        assert keep is not None
        quotas_K = bucket_quotas(sizes_K, keep=min(keep, int(sizes_K.sum())), rule=selector.quota)
    runs = list(_runs(sizes_K))
    inputs = (
        (buckets, place, run, len(groups), None if quotas_K is None else quotas_K[run.start : run.stop])
        for place, run in enumerate(runs)
    )
    accounts = list(ordered(_decide_run, inputs))
    if isinstance(selector, OutcomeSelector) and selector.bucket_by == "clusters":
        _write_sweep(folder, accounts, rows=int(sizes_K.sum()))
    storage.write_bytes(storage.join(folder, UNCOMPARED), json.dumps({"rows": rows - int(sizes_K.sum())}).encode())
    _write_verdict(folder, len(runs), groups, num_kept=sum(account["kept"] for account in accounts))
    for place in range(len(groups)):
        for name in ("bin", "json"):
            storage.delete(storage.join(folder, "rows", f"{place:08d}.{name}"))


def without_vector(folder: str) -> int:
    """How many rows reached a decided step and were not compared, for want of the column."""
    url = storage.join(folder, UNCOMPARED)
    return json.loads(storage.read_bytes(url))["rows"] if storage.exists(url) else 0


def _cut_finer(buckets: Buckets, groups: Sequence[list[int]], rows: int) -> int:
    """How many buckets there are; for clusters, cutting.npz is there afterwards."""
    selector, url = buckets.selector, storage.join(buckets.folder, "cutting.npz")
    if selector.bucket_by == "hashes":
        return -(-rows // selector.bucket_rows)
    if not storage.exists(url):
        num_clusters = bucketing.num_clusters_for(rows, bucket_rows=selector.bucket_rows)
        share = bucketing.sample_share(rows, num_clusters=num_clusters)
        sample = np.concatenate(list(ordered(_sample, ((buckets, group, share) for group in groups))))
        inputs = [(sample, num_clusters, rows, selector.exact_rows, buckets.seed)]
        cutting = next(ordered(_fit, inputs))
        with storage.write_atomic(url) as file:
            np.savez(file, centroids=cutting.centroids_KD, parts=cutting.parts_K)
    return _cutting(buckets.folder).num_buckets


def _cutting(folder: str) -> Cutting:
    with np.load(io.BytesIO(storage.read_bytes(storage.join(folder, "cutting.npz"))), allow_pickle=False) as file:
        return Cutting(file["centroids"], file["parts"])


def _runs(sizes_K: np.ndarray) -> Iterator[range]:
    """Neighbouring buckets of together at most ROWS_PER_RUN rows."""
    first, rows = 0, 0
    for bucket, size in enumerate(sizes_K.tolist()):
        if bucket > first and rows + size > ROWS_PER_RUN:
            yield range(first, bucket)
            first, rows = bucket, 0
        rows += size
    yield range(first, len(sizes_K))


def _write_sweep(folder: str, accounts: Sequence[dict[str, Any]], *, rows: int) -> None:
    """sweep.csv: what would fall at other thresholds, in the same order of preference."""
    fallen = np.sum([account["sweep"] for account in accounts], axis=0).astype(int).tolist()
    lines = ["min_cosine,removed,removed_fraction"]
    lines += [f"{cosine:g},{count},{count / max(rows, 1):.6f}" for cosine, count in zip(SWEEP, fallen, strict=True)]
    storage.write_bytes(storage.join(folder, "sweep.csv"), ("\n".join(lines) + "\n").encode())


def _write_verdict(folder: str, num_runs: int, groups: Sequence[list[int]], *, num_kept: int) -> None:
    """Sort the kept rows by address, on disk; the score's bits travel beside it as the second word."""
    num_shards = 1 + max((group[-1] for group in groups), default=-1)

    def read(place: int) -> tuple[np.ndarray, np.ndarray]:
        part = storage.read_bytes(storage.join(folder, "kept", f"{place:08d}.npy"))
        kept = np.load(io.BytesIO(part), allow_pickle=False)
        words = np.stack([kept["address"].astype(np.uint64), kept["score"].view(np.uint32).astype(np.uint64)], axis=1)
        return words, kept["address"]

    spread = range(0, num_runs, max(1, num_runs // 64))
    sample = np.concatenate([np.zeros((0, 2), np.uint64), *(read(place)[0][::64] for place in spread)])
    with tempfile.TemporaryDirectory(prefix="curation-verdict-") as spool:
        by_address = UidSort(Path(spool), splitters_P2=splitters(sample, num_rows=num_kept))
        for place in range(num_runs):
            by_address.add(*read(place))
        blocks = (
            KeptRows(block["address"], block["low"].astype(np.uint32).view(np.float32))
            for block in by_address.sorted_blocks()
        )
        verdicts.write(folder, blocks, num_rows=num_kept, num_shards=num_shards)


def columns_of(table: pa.Table, needs: frozenset[str]) -> dict[str, np.ndarray]:
    """Columns of a table as rows hold them: words of hashes (n, 2) int64, vectors (n, D) float16, else float32.

    A row without a sha256 has the words of its uid, which no other row has.
    """
    columns: dict[str, np.ndarray] = {}
    for name in sorted(needs):
        if name in ("uid", "sha256"):
            texts = table[name].to_pylist()
            if name == "sha256":
                texts = [text[:32] if text else uid for text, uid in zip(texts, table["uid"].to_pylist(), strict=True)]
            columns[name] = sampling.uid_words(texts).view(np.int64)
        else:
            is_own = name.startswith(JSON_PREFIX)
            values = tables.numbers_in(table[name]) if is_own else tables.as_array(table[name], name=name)
            columns[name] = values if values.ndim == 2 else values.astype(np.float32)
    return columns


# What runs in a task.


def _unit(vectors_ND: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.array(vectors_ND, np.float32)), dim=1)


def _sample(buckets: Buckets, numbers: list[int], share: float) -> np.ndarray:
    """Vectors (m, D) of the rows whose hash says that they are of the sample."""
    column = buckets.selector.column
    parts = []
    for number in numbers:
        table = _with_vector(buckets, buckets.candidates(number, frozenset({"uid", column})))
        chosen = sampling.hash_uniform(sampling.uid_words(table["uid"].to_pylist()), buckets.seed) < share
        if chosen.any():
            parts.append(tables.as_array(table.filter(pa.array(chosen))[column], name=column))
    width = tables.as_array(table[column], name=column).shape[1] if not parts else 0
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float16)


def _fit(sample_ND: np.ndarray, num_clusters: int, num_rows: int, most_rows: int, seed: int) -> Cutting:
    return bucketing.fit_cutting(
        _unit(sample_ND), num_clusters=num_clusters, num_rows=num_rows, most_rows=most_rows, seed=seed % 2**31
    )


def _cut(buckets: Buckets, place: int, numbers: list[int]) -> np.ndarray:
    """Write the rows of a group of shards, sorted by bucket, unless they are there; rows by bucket (K,)."""
    selector = buckets.selector
    url, account_url = _rows_urls(buckets, place)
    if storage.exists(account_url):
        return np.diff(json.loads(storage.read_bytes(account_url))["begins"])
    parts = [_compared(buckets, number) for number in numbers]
    # Of a shard without rows not even the width of its vectors is known.
    parts = [part for part in parts if len(part["address"])] or parts[:1]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    address = columns.pop("address")
    if buckets.num_buckets == 1:
        bucket = np.zeros(len(address), np.int64)
    elif selector.bucket_by == "hashes":
        bucket = bucketing.buckets_by_hash(columns[selector.column].view(np.uint64), num_buckets=buckets.num_buckets)
    else:
        cutting, words = _cutting(buckets.folder), columns["uid"].view(np.uint64)
        bucket = bucketing.buckets_by_cluster(cutting, _unit(columns[selector.column]), words)
    fields = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    rows = np.empty(len(address), np.dtype([("address", "<i8"), *fields]))
    for name, values in {"address": address, **columns}.items():
        rows[name] = values
    order = np.argsort(bucket, kind="stable")
    begins = np.searchsorted(bucket[order], np.arange(buckets.num_buckets + 1))
    storage.write_bytes(url, rows[order].tobytes())
    account = {"dtype": np.lib.format.dtype_to_descr(rows.dtype), "begins": begins.tolist()}
    storage.write_bytes(account_url, json.dumps(account).encode())
    return np.diff(begins)


def _compared(buckets: Buckets, number: int) -> dict[str, np.ndarray]:
    """Columns of the rows of one shard that can be compared, and their addresses. A json field's type is the shard's
    own, so it is made an array before shards are put together."""
    needs = buckets.selector.needs
    table = _with_vector(buckets, buckets.candidates(number, needs | {"address", "uid"}))
    return {"address": table["address"].to_numpy(), **columns_of(table, needs | {"uid"})}


def _with_vector(buckets: Buckets, table: pa.Table) -> pa.Table:
    """The rows that have a vector: a column of `jobs.fit` has none of an image that it could not decode."""
    by_vector = buckets.selector.bucket_by == "clusters"
    return table.filter(table[buckets.selector.column].is_valid()) if by_vector else table


def _rows_urls(buckets: Buckets, place: int) -> tuple[str, str]:
    rows = storage.join(buckets.folder, "rows")
    return storage.join(rows, f"{place:08d}.bin"), storage.join(rows, f"{place:08d}.json")


def _read_run(buckets: Buckets, run: range, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a run of buckets, and the bucket of each."""
    parts, of_bucket = [], []
    for place in range(num_groups):
        url, account_url = _rows_urls(buckets, place)
        account = json.loads(storage.read_bytes(account_url))
        dtype = np.dtype([(name, kind, tuple(shape[0]) if shape else ()) for name, kind, *shape in account["dtype"]])
        begins = account["begins"][run.start : run.stop + 1]
        if begins[-1] > begins[0]:
            data = storage.read_range(url, begins[0] * dtype.itemsize, begins[-1] * dtype.itemsize)
            parts.append(np.frombuffer(data, dtype))
            of_bucket.append(np.repeat(np.arange(run.start, run.stop), np.diff(begins)))
    return (np.concatenate(parts), np.concatenate(of_bucket)) if parts else (np.zeros(0, KEPT_DTYPE), np.zeros(0))


def _decide_run(
    buckets: Buckets, place: int, run: range, num_groups: int, quotas_K: np.ndarray | None
) -> dict[str, Any]:
    """Decide a run of buckets, unless it is decided: its account."""
    url, account_url = (storage.join(buckets.folder, "kept", f"{place:08d}.{end}") for end in ("npy", "json"))
    if storage.exists(account_url):
        account = json.loads(storage.read_bytes(account_url))
        # Code that parts the buckets otherwise must not take this for all that it would decide here.
        if account.get("buckets") == [run.start, run.stop]:
            return account
    rows, of_bucket = _read_run(buckets, run, num_groups)
    kept, sweep = [np.zeros(0, KEPT_DTYPE)], np.zeros(len(SWEEP), np.int64)
    for bucket in run:
        here = rows[of_bucket == bucket]
        if not len(here):
            continue
        columns = {name: torch.from_numpy(here[name].copy()) for name in here.dtype.names or () if name != "address"}
        quota = None if quotas_K is None else int(quotas_K[bucket - run.start])
        chosen, scores = _decide_bucket(buckets, bucket, columns, quota)
        stays = np.empty(len(chosen), KEPT_DTYPE)
        stays["address"], stays["score"] = here["address"][chosen], scores[chosen]
        kept.append(stays)
        sweep += (scores[:, None] <= 1 - np.array(SWEEP, np.float32)).sum(axis=0)
    whole = np.concatenate(kept)
    with storage.write_atomic(url) as file:
        np.save(file, whole[np.argsort(whole["address"], kind="stable")])
    account = {
        "buckets": [run.start, run.stop],
        "rows": len(rows),
        "kept": len(whole),
        "sweep": sweep.tolist(),
    }
    storage.write_bytes(account_url, json.dumps(account).encode())
    return account


def _decide_bucket(buckets: Buckets, bucket: int, rows: Rows, quota: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Places (k,) of the rows that stay, and the scores (n,) of all."""
    selector = buckets.selector
    if isinstance(selector, OutcomeSelector):
        scores = selector.score(rows, PROGRESS)
        return (scores > selector.above).nonzero().flatten().numpy(), scores.numpy()
    assert isinstance(selector, QuotaSelector) and quota is not None
    words = np.array([[buckets.seed, bucket]], np.uint64)
    rng = Generator().manual_seed(int(sampling.hash_words(words, 0)[0] >> np.uint64(1)))
    selection, scores = selector.select_scored(rows, quota, PROGRESS, rng)
    return selection.indices.numpy(), scores.numpy()
