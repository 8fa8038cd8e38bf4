"""Bring your own trainer: an iterable from which any PyTorch loop pulls sub-batches that a method selected.

    with SelectedBatches(recipe, model) as batches:                 # every rank, after torch's init_process_group
        batches.load_state_dict(saved["batches"])                   # to go on; before the loop
        for batch in batches:
            loss = mine(model(batch.images, batch.texts), batch.weights)
            ...
            saved = {"model": model.state_dict(), "batches": batches.state_dict()}

The recipe is one of `jobs.train`; what it says of learning rates and the loss is left to the loop. Scoring, selection,
ledger, score log and the log of the steps are those of `jobs.train`, and a state's position means the same: what a step
gets follows from the pool, the seed, the number of ranks and the weights alone.

n = b/W rows of this rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curation.columns import LEDGER_COLUMNS
from curation.data import manifest, step_log, storage
from curation.data.lease import Lease
from curation.data.step_log import Row
from curation.distributed.checkpoint import tag_of
from curation.distributed.comparison import comparison_of
from curation.distributed.learners import build_learner
from curation.distributed.pool_scoring import PoolScoring
from curation.distributed.ready_batches import LoopSpec, OwnScoring, Ready, ReadyBatches
from curation.distributed.resources import cluster
from curation.distributed.run_ledger import RunLedger, barrier
from curation.distributed.scoring_pool import close_pool
from curation.distributed.step_notes import StepNotes
from curation.distributed.train import loop_spec, settings_of
from curation.distributed.train_plan import checked, commit_to, resolved
from curation.recipe import TrainRecipe
from curation.training.collectives import ranks
from curation.training.picking import Picker


class SelectedBatch(NamedTuple):
    """This rank's rows of one sub-batch, on the model's device."""

    images: Tensor
    """float32 (n, 3, S, S), normalised as the recipe's learner wants them; features (n, F) of a pool of features."""
    texts: Tensor
    """int64 (n, L)."""
    weights: Tensor
    """(n,) float32: the loss is the mean of weight times loss; all ones for a method that does not weigh."""
    addresses: Tensor
    """(n,) int64 of the rows, on the CPU."""
    step: int


class SelectedBatches:
    """Iterable once, from the state that was loaded to the recipe's last step. Collective: all ranks do the same."""

    def __init__(self, recipe: TrainRecipe, model: nn.Module):
        """`model` is open_clip's, on its device, or a DistributedDataParallel around it; it scores as it is trained.

        ValueError if the recipe cannot run as it is, on every rank; OtherRun or OutputInUse as `jobs.train`.
        """
        if recipe.is_classifier or recipe.low_resolution.is_on:
            raise ValueError("SelectedBatches serves pairs at the learner's own resolution: the rest is jobs.train's")
        self._rank, self._world_size = ranks()
        if recipe.compute.workers != self._world_size:
            recipe = recipe.model_copy(
                update={"compute": recipe.compute.model_copy(update={"workers": self._world_size})}
            )
            recipe = TrainRecipe.model_validate(recipe.model_dump())
        unwrapped = cast(nn.Module, getattr(model, "module", model))
        self._device = next(unwrapped.parameters()).device
        self._held = contextlib.ExitStack()
        self._ledger: RunLedger | None = None
        self._notes: StepNotes | None = None
        self._steps: list[Row] = []
        self._spec = self._begin(recipe)
        try:
            self._learner = build_learner(self._spec.learner, self._device, clip=unwrapped)
        except ValueError:
            self._end()
            raise
        self._done, self._tag, self._totals = 0, cast(str | None, None), cast(dict[str, float], {})

    @property
    def recipe(self) -> TrainRecipe:
        """As it runs."""
        return self._spec.recipe

    def __len__(self) -> int:
        """Steps that are left."""
        return self.recipe.train.num_steps - self._done

    def __iter__(self) -> Iterator[SelectedBatch]:
        if self._ledger is not None:
            raise RuntimeError("these batches have been iterated already: load_state_dict comes before the loop")
        self._ledger = ledger = RunLedger(self._spec, tag=self._tag, device=self._device)
        self._notes = StepNotes(self.recipe, self._totals) if self._rank == 0 else None
        batches = self._batches(ledger)
        for ready in batches.ready(range(self._done, self.recipe.train.num_steps)):
            ledger.record(ready)
            if self._notes is not None:
                self._steps.append(self._notes.of(ready))
            self._done = ready.number + 1
            yield self._batch(ready)
            # Only now, when the loop asks for more, has the step been taken.
            batches.trained(self._done)

    def note(self, **figures: float) -> None:
        """Add figures of the last step, such as its loss, to the run's log."""
        if self._steps:
            self._steps[-1] |= figures

    def state_dict(self) -> dict[str, Any]:
        """Position, ledger tag and totals after the batch that was yielded last. Collective.

        The ledger keeps the snapshots of the two newest states.
        """
        if self._ledger is None:
            return {"step": self._done, "tag": self._tag, "totals": self._totals, "identity": self._identity()}
        self._tag = tag_of(self._done)
        self._ledger.save(self._tag)
        if self._notes is not None:
            step_log.write_part(self.recipe.output, "steps", self._steps)
            self._steps, self._totals = [], dict(self._notes.totals)
            self._ledger.forget_old()
        barrier()
        return {"step": self._done, "tag": self._tag, "totals": self._totals, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with any number of ranks. ValueError if it is another run's; before the loop."""
        if self._ledger is not None:
            raise RuntimeError("load_state_dict comes before the loop")
        manifest.check_same(state["identity"], self._identity(), what="a state")
        self._done, self._tag, self._totals = state["step"], state["tag"], state["totals"]

    def close(self) -> None:
        """Write the rest of the log, and end what was started. Collective."""
        if self._ledger is not None:
            self._ledger.close()
            if self._notes is not None:
                step_log.write_part(self.recipe.output, "steps", self._steps)
                step_log.merge(self.recipe.output, "steps")
        if self._rank:
            self._held.close()  # still joined to rank 0's Ray when that ends, a process is ended with it
        barrier()
        self._end()

    def _end(self) -> None:
        if self._rank == 0:
            if self._spec.pool is not None:
                close_pool(self._spec.pool)
            self._spec.ledger.close()
        self._held.close()

    def __enter__(self) -> SelectedBatches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _begin(self, recipe: TrainRecipe) -> LoopSpec:
        """Check, commit and start everything on rank 0; the others join its Ray. Errors of rank 0 are everyone's."""
        spec, address, error = None, "", None
        if self._rank == 0:
            try:
                spec, address = self._start(recipe), ray.get_runtime_context().gcs_address
            except (ValueError, RuntimeError, OSError) as raised:
                self._held.close()
                error = raised
        address, token, error = _from_rank_0(address, os.environ.get("RAY_AUTH_TOKEN"), error)
        if error is not None:
            raise error
        if self._rank:
            self._join(address, token)
        # Handles of actors mean something to those alone who have joined.
        [spec] = _from_rank_0(spec)
        return spec

    def _start(self, recipe: TrainRecipe) -> LoopSpec:
        recipe = resolved(recipe)
        self._held.enter_context(Lease(recipe.output))
        plan = checked(recipe)
        commit_to(recipe, plan)
        compute = recipe.compute
        self._held.enter_context(cluster(num_cpus=compute.workers * compute.feed_actors + compute.scoring_actors))
        return loop_spec(recipe, plan, device=self._device_type())

    def _join(self, address: str, token: str | None) -> None:
        if ray.is_initialized():
            return
        if token is not None:
            os.environ.setdefault("RAY_AUTH_TOKEN", token)
        os.environ["RAY_ADDRESS"] = address
        self._held.enter_context(cluster(num_cpus=0))

    def _device_type(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _identity(self) -> dict[str, Any]:
        return manifest.read(storage.join(self.recipe.output, "recipe.json"))["identity"]

    def _batches(self, ledger: RunLedger) -> ReadyBatches:
        if self._spec.pool is not None:
            pool = PoolScoring(self._spec.pool, self._spec, self._learner.network, device=self._device)
            if self._rank == 0:
                pool.begin(self._done)
            barrier()
            return pool
        selector = self.recipe.selector()
        recall = ledger.recall if selector.needs & LEDGER_COLUMNS else None
        compare = comparison_of(self._spec.learner, self._learner)
        picker = Picker(self._learner, selector, settings_of(self.recipe), recall=recall, compare=compare)
        return OwnScoring(self._spec, picker)

    def _batch(self, ready: Ready) -> SelectedBatch:
        assert ready.sub_batch is not None
        images, texts = ready.sub_batch.inputs
        with torch.no_grad():
            images = cast(Any, self._learner.network).normalise(images)
        return SelectedBatch(images, texts, ready.sub_batch.weights, ready.sub_batch.addresses, ready.number)


class OpenClipData:
    """What open_clip's own training loop takes as data["train"]: `batches` in epochs of so many steps.

    Weights do not reach that loop: it is for methods that choose and do not weigh.
    """

    def __init__(self, batches: SelectedBatches, *, steps_per_epoch: int):
        self.dataloader = self
        self.num_batches = steps_per_epoch
        self.num_samples = steps_per_epoch * batches.recipe.train.sub_batch
        self._batches = batches
        self._stream: Iterator[SelectedBatch] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the stream of rows goes on where it was."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._stream = self._stream or iter(self._batches)
        for _ in range(self.num_batches):
            batch = next(self._stream, None)
            if batch is None:
                return
            yield batch.images, batch.texts


def _from_rank_0(*values: Any) -> list[Any]:
    """Rank 0's values, on every rank."""
    told = list(values)
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told
