"""Actors that sleep in place of the work. An embedding one does not import torch: 64 of them fit on a small machine."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.data import manifest
from curation.distributed.roster import bench

STAGE = "sleep"


@dataclass(frozen=True)
class SleepSpec:
    """What a sleeper is told."""

    output: str
    forward_s: float
    """Seconds of the model for a shard."""
    ahead_s: float
    """Seconds of reading and decoding a shard, which the next shard does while the model serves this one."""
    run: str


class Sleeper:
    """Commits shards as ShardEmbed does, two at a time of which one has the model, with sleep for all else."""

    def __init__(self, spec: SleepSpec):
        self._spec, self._bench, self._model = spec, bench(spec.run), threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row (number) in, one row (record) out: when the model was done with the shard."""
        spec, number = self._spec, int(batch["number"][0])
        with self._bench.attempt("shard", number) as attempt:
            time.sleep(spec.ahead_s)
            with self._model, attempt.forward():
                time.sleep(spec.forward_s)
            record = {"shard": number, "done": time.time()}
            with attempt.write():
                manifest.commit(spec.output, STAGE, number, record, made_by={})
        return {"record": [json.dumps(record)]}


@dataclass(frozen=True)
class ReadSpec:
    """What a sleeping reader is told: seconds a share, and the side of its blank images."""

    read_s: float
    side: int


class SleepingReader:
    """Answers a planned share as ReadShare does, with blank images after a sleep."""

    def __init__(self, spec: ReadSpec):
        self._spec = spec

    def __call__(self, planned: pa.Table) -> dict[str, np.ndarray]:
        """One planned row in, the rows of the share out."""
        time.sleep(self._spec.read_s)
        [row] = planned.to_pylist()
        count = sum(map(len, row["rows"]))
        pixels = np.zeros((count, self._spec.side, self._spec.side, 3), np.uint8)
        return {"step": np.full(count, row["step"]), "pixels": pixels}
