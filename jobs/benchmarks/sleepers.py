"""An embedding actor that sleeps in place of the model. It does not import torch: 64 of them fit on a small machine."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

import numpy as np

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
