"""One actor of the scoring pool: it reads super-batches, chooses from them, and leaves the parts of a sub-batch.

B rows of the super-batch, W training workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch

from curation.distributed.feed import ENCODED, ReadShare, Share, plan_step
from curation.distributed.learners import build_learner
from curation.distributed.ready_batches import Chooser, LoopSpec, Ready, as_rows
from curation.training.online_step import OnlineSettings
from curation.training.picking import Picker
from curation.training.step import NotFinite


class Scorer:
    """One actor: a copy of the learner, a reader, and the choice."""

    def __init__(self, spec: LoopSpec, settings: OnlineSettings, device: str):
        recipe = spec.recipe
        torch.set_num_threads(recipe.compute.torch_threads)
        self._spec, self._settings = spec, settings
        self._share = Share(recipe.train.super_batch, 0, 1)
        self._shards, self._rounds = spec.stream()
        self._read = ReadShare(spec.feed)
        self._learner = build_learner(spec.learner, torch.device(device))
        self._chooser = Chooser(spec, Picker(self._learner, recipe.selector(), settings))
        self._blocks: dict[int, dict[str, np.ndarray]] = {}
        self._version: int | None = None

    def begin(self) -> None:
        """It is there; whatever it was asked before is no longer wanted."""
        self._blocks.clear()

    def read(self, step: int) -> None:
        """Read and decode a step's super-batch, and hold it."""
        block = self._read(plan_step(step, self._shards, self._rounds, self._share))
        del block["step"]
        self._blocks[step] = block

    def serve(self, step: int, version: int, weights: list[Any], world_size: int) -> tuple[Any, ...]:
        """The facts of a step that was read, and a part of its sub-batch for each worker.

        `weights` is the reference of the learner's state after `version` steps.
        """
        block = self._blocks.pop(step)
        if version != self._version:
            self._learner.network.load_state_dict(ray.get(weights[0]))
            self._version = version
        encoded = block.pop(ENCODED, None)
        try:
            ready = self._chooser.choose(step, as_rows(block), encoded, model=None)
        except NotFinite as error:
            failed = {"why": str(error), "rows": error.rows, "addresses": error.addresses}
            return ({"failed": failed}, *[None] * world_size)
        seconds = {f"pool_seconds_{name}": value for name, value in ready.watch.seconds.items()}
        facts = {
            "row_flops": tuple(ready.row_flops),
            "reference_loss": ready.picked.reference_loss,
            "noted": {"weights_age": step - version, **ready.noted, **seconds},
        }
        has_low = self._learner.low_images is not None
        return (facts, *(part_of(ready, rank, world_size, has_low=has_low) for rank in range(world_size)))


def part_of(ready: Ready, rank: int, world_size: int, *, has_low: bool) -> dict[str, Any]:
    """What one worker gets of a sub-batch that was chosen in one place, as arrays: every W-th of its rows.

    So rows in full come first here too; `has_low` says that images at low resolution are the last of its inputs.
    """
    chosen, sub_batch = ready.picked.chosen, ready.sub_batch
    assert sub_batch is not None
    inputs = [column[rank::world_size] for column in sub_batch.inputs]
    if has_low:
        # Of all rows, low row q is the one at place num_full + q.
        first = (rank - len(sub_batch.inputs[0])) % world_size
        inputs[-1] = sub_batch.inputs[-1][first::world_size]
    n = len(ready.addresses) // world_size
    mine = slice(rank * n, (rank + 1) * n)
    addresses, values = ready.picked.recorded
    is_mine = torch.isin(addresses, ready.addresses[mine])
    # The log is rank 0's, and wants to know of all chosen rows.
    told = ("address", "uid", "reference_image_embedding")
    selected = {name: chosen.selected[name] for name in told if name in chosen.selected} if rank == 0 else {}
    return {
        "inputs": [_array(column) for column in inputs],
        "weights": _array(sub_batch.weights[rank::world_size]),
        "trained_on": _array(sub_batch.addresses[rank::world_size]),
        "addresses": _array(ready.addresses[mine]),
        "ok": _array(ready.ok[mine]),
        "scores": _array(chosen.scores[mine]),
        "is_selected": _array(chosen.is_own_selected[mine]),
        "row_weights": _array(chosen.row_weights[mine]),
        "recorded": (_array(addresses[is_mine]), _array(values[is_mine])),
        "selected": {name: _array(value) for name, value in selected.items()},
    }


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().contiguous().numpy()
