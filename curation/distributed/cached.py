"""The embedding stage of a pool whose embeddings are there already: a shard and its vectors in, its table out.

A shard is metadata with arrays beside it, or, when the recipe joins metadata to a pool, images whose samples find their
vectors by uid. No image is decoded either way.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import addresses
from curation.data import cached_embeddings, manifest, open_shard, tables
from curation.data.cached_embeddings import Cached
from curation.data.read_rules import ReadRules
from curation.data.storage import ListedShard
from curation.distributed.embed import STAGE

LIST_THREADS = 32


@dataclass(frozen=True)
class CachedSpec:
    """What an actor is told."""

    output: str
    layout: str
    rules: ReadRules
    made_by: Mapping[str, Any]
    decode_threads: int = 1


class CachedEmbed:
    """Commits shards, one a call, as ShardEmbed does. Called by Ray Data; needs no Ray itself."""

    def __init__(self, spec: CachedSpec):
        self._spec = spec

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row (number, url, fingerprint) in, one row (record) out; "pending" if the store does not give a file."""
        number, url = int(batch["number"][0]), str(batch["url"][0])
        try:
            record = manifest.find(self._spec.output, STAGE, number, made_by=self._spec.made_by)
            record = record or self.commit(number, url, str(batch["fingerprint"][0]))
        except OSError as error:
            record = {"shard": number, "url": url, "pending": f"{type(error).__name__}: {error}"}
        return {"record": [json.dumps(record)]}

    def commit(self, number: int, url: str, fingerprint: str) -> dict[str, Any]:
        """Write one shard's table and its manifest. OSError if a file cannot be read, or changed meanwhile."""
        spec, begun = self._spec, time.perf_counter()
        if spec.rules.metadata:
            cached = cached_embeddings.read_joined(url, spec.layout, spec.rules)
            now = open_shard.fingerprint(url)
        else:
            cached = cached_embeddings.read(url, spec.layout, spec.rules)
            now = cached_embeddings.fingerprint(url, spec.layout)
        if now != fingerprint:
            raise OSError(f"{url} or its embeddings changed while they were read")
        read = time.perf_counter()
        tables.write(spec.output, number, table_of(number, url, cached))
        too_many = tables.too_many_columns([sample.fields for sample in cached.samples])
        dropped = Counter(reason for reason in cached.reasons if reason is not None)
        record = {
            "shard": number,
            "url": url,
            "fingerprint": fingerprint,
            "sha256": cached.sha256,
            "bytes": cached.num_bytes,
            "read": len(cached.samples),
            "embedded": len(cached.image_ND),
            "dropped": dict(sorted(dropped.items())),
            "decoded": 0,
            "warnings": dict(sorted((cached.warnings | too_many).items())),
            "seconds": {
                "wait": round(read - begun, 4),
                "decode": 0.0,
                "forward": 0.0,
                "write": round(time.perf_counter() - read, 4),
            },
        }
        if record["read"] != record["embedded"] + dropped.total():
            raise AssertionError(f"{url}: {record['read']} rows read, {record['embedded']} embedded, {dropped} dropped")
        manifest.commit(spec.output, STAGE, number, record, made_by=spec.made_by)
        return record


def table_of(number: int, url: str, cached: Cached) -> Any:
    """A shard's sample table."""
    samples, reasons = cached.samples, cached.reasons
    scores = iter(np.einsum("nd,nd->n", cached.image_ND, cached.text_ND).tolist())
    columns = {
        "address": addresses.pack(number, np.arange(len(samples))),
        "uid": [sample.uid for sample in samples],
        "key": [sample.key for sample in samples],
        "shard": [url] * len(samples),
        "offset": [sample.offset for sample in samples],
        "status": ["ok" if reason is None else "dropped" for reason in reasons],
        "reason": reasons,
        "caption": [sample.caption for sample in samples],
        "width": [None] * len(samples),
        "height": [None] * len(samples),
        "sha256": [sample.sha256 for sample in samples],
        "image_embedding": cached.image_ND.astype(np.float16),
        "text_embedding": cached.text_ND.astype(np.float16),
        "clip_score": [next(scores) if reason is None else None for reason in reasons],
    }
    return tables.sample_table(columns, [sample.fields for sample in samples])


def with_embeddings(listed: list[ListedShard], layout: str) -> list[ListedShard]:
    """The listing with fingerprints that tell the arrays too. ValueError if a shard is none of the layout's."""
    for shard in listed:
        cached_embeddings.sources(shard.url, layout)
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        marks = pool.map(lambda s: s.fingerprint and cached_embeddings.fingerprint(s.url, layout), listed)
        return [ListedShard(shard.url, mark) for shard, mark in zip(listed, marks, strict=True)]
