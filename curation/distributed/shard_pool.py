"""One row, one block, one shard a call: a class over shards on a pool of Ray Data's actors."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from curation.distributed.resources import Placement


def records_of(
    actor: type, spec: Any, rows: Sequence[pa.Table], placement: Placement, *, calls_at_a_time: int
) -> Generator[dict[str, Any], None, None]:
    """What `actor(spec)` answers to each row, `{"record": [JSON]}`, as they come; no row, no actor.

    The driver handles few big blocks, and a retry redoes one shard. With several calls at a time the actor is called
    from as many threads.
    """
    if not rows:
        return
    records = ray.data.from_arrow(list(rows)).map_batches(
        actor,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(
            size=min(placement.actors, len(rows)),
            max_tasks_in_flight_per_actor=calls_at_a_time,
            max_concurrent_calls_per_actor=calls_at_a_time,
            enable_true_multi_threading=calls_at_a_time > 1,
        ),
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus or None,
    )
    for row in records.iter_rows():
        yield json.loads(row["record"])
