"""A training worker's way to the scoring pool: it publishes the learner's weights and pulls its part of sub-batches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from curation.distributed.ready_batches import LoopSpec, Ready
from curation.selector import Rows
from curation.training.collectives import ranks
from curation.training.learner import RowFlops
from curation.training.online import Chosen
from curation.training.picking import Picked, Stopwatch, SubBatch
from curation.training.step import NotFinite

WAIT_TOLD_S = 60.0
"""A worker that has waited so long says so."""


class PoolScoring:
    """A training worker's way to the pool; see ReadyBatches."""

    def __init__(self, pool: Any, spec: LoopSpec, network: torch.nn.Module, *, device: torch.device):
        """`network` is the learner's; rank 0 publishes its weights."""
        self._pool, self._network, self._device = pool, network, device
        self._publish_every = spec.recipe.train.publish_every

    def begin(self, first_step: int) -> None:
        """On rank 0, before any worker asks: serve from this step on, with the weights as they are."""
        ray.get(self._pool.begin.remote(first_step, ranks().world_size))
        self._publish(first_step)

    def ready(self, steps: range) -> Iterator[Ready]:
        """As in ReadyBatches."""
        rank = ranks().rank
        for number in steps:
            begun = time.perf_counter()
            facts, part = self._taken(number, rank)
            if failed := facts.get("failed"):
                error = NotFinite(failed["why"], rows=failed["rows"])
                error.addresses = failed["addresses"]
                raise error
            served: Any = ray.get(part[0])
            waited = time.perf_counter() - begun
            yield self._as_ready(number, facts, served)._replace(noted={"seconds_wait": waited, **facts["noted"]})

    def _taken(self, number: int, rank: int) -> tuple[Any, list[Any]]:
        """What the pool gives of a step; says so where that takes long."""
        asked = self._pool.take.remote(number, rank)
        while not ray.wait([asked], timeout=WAIT_TOLD_S)[0]:
            state: Any = ray.get(self._pool.state.remote())
            warnings.warn(
                f"step {number} waits for the scoring pool: {state['scorers']} of its {state['places']} scorers are "
                f"there (do they find a GPU, or on CPUs a CPU?), {state['deaths']} have died",
                stacklevel=1,
            )
        told: Any = ray.get(asked)
        return told

    def trained(self, done: int) -> None:
        """Publish, if it is time."""
        if ranks().rank == 0 and done % self._publish_every == 0:
            self._publish(done)

    def _publish(self, version: int) -> None:
        state = {name: value.detach().cpu().clone() for name, value in self._network.state_dict().items()}
        self._pool.publish.remote(version, [ray.put(state)])

    def _as_ready(self, number: int, facts: dict[str, Any], served: dict[str, Any]) -> Ready:
        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.array(values))

        none = torch.zeros(0, dtype=torch.int64)
        addresses, ok = tensor(served["addresses"]), tensor(served["ok"])
        is_selected = tensor(served["is_selected"])
        weights = tensor(served["weights"]).to(self._device)
        selected: Rows = {name: tensor(value) for name, value in served["selected"].items()}
        chosen = Chosen(
            own=none,
            handovers=[],
            weights=weights,
            scores=tensor(served["scores"]),
            selected=selected,
            is_own_selected=is_selected,
            row_weights=tensor(served["row_weights"]),
            is_low=torch.zeros(0, dtype=torch.bool),
        )
        recorded = tensor(served["recorded"][0]), tensor(served["recorded"][1])
        picked = Picked(chosen, None, facts["reference_loss"], recorded, addresses[is_selected])
        inputs = [tensor(column).to(self._device) for column in served["inputs"]]
        return Ready(
            number,
            picked,
            SubBatch(inputs, weights, tensor(served["trained_on"])),
            addresses,
            ok,
            RowFlops(*facts["row_flops"]),
            Stopwatch(),
            {},
        )
