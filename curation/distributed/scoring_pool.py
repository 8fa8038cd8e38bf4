"""Online scoring by a pool of actors that serves selected sub-batches.

Each scorer holds a copy of the learner, reads whole super-batches itself and leaves only what it chose in the object
store: a sub-batch, in one part for each training worker. Different scorers work on different steps, so more of them
serve more steps at a time, and what one of them was doing when it died, another does again.

Which weights score which step is laid down by the recipe and not by who happens to be quick: step t is scored with the
newest weights that were published (every `publish_every` steps) at least `score_ahead` steps before it. So the age of
the weights is at least `score_ahead` and less than `score_ahead + publish_every` steps, a run can be repeated, and with
no step ahead and weights published at every step, what is chosen is what the workers would choose themselves. For that
many steps after a restart the weights are those of the checkpoint: younger than they would have been.

B rows of the super-batch, b of the sub-batch, W training workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from curation.distributed.feed import ENCODED, ReadShare, Share, plan_step
from curation.distributed.learners import build_learner
from curation.distributed.ready_batches import Chooser, LoopSpec, Ready, as_rows
from curation.selector import Rows
from curation.training.collectives import ranks
from curation.training.learner import RowFlops
from curation.training.online import Chosen
from curation.training.online_step import OnlineSettings
from curation.training.picking import Picked, Picker, Stopwatch, SubBatch
from curation.training.step import NotFinite

HELD_BLOCKS = 2
"""Super-batches that a scorer holds: one that it scores, and one that it has read ahead."""
WAIT_TOLD_S = 60.0
"""A worker that has waited so long says so."""
DEATHS_IN_A_ROW = 5
"""So often may a place's scorers die without serving anything, before the run hears of it."""


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


class Serving(NamedTuple):
    """Which steps are served, and with which weights."""

    num_steps: int
    score_ahead: int
    publish_every: int

    def version(self, step: int) -> int:
        """After how many steps the weights are taken that score a step."""
        return max(step - self.score_ahead, 0) // self.publish_every * self.publish_every


class ScoringPool:
    """The actor that hands steps to scorers and their sub-batches to workers. One attempt of the workers at a time."""

    def __init__(self, serving: Serving, num_scorers: int, new_scorer: Callable[[], Any]):
        """`new_scorer` starts an actor that is a Scorer, or answers as one does."""
        self._serving, self._new_scorer = serving, new_scorer
        self._scorers: list[Any] = [None] * num_scorers
        self._places: list[asyncio.Task] = []
        self._changed = asyncio.Condition()
        self._world_size = 0
        self._next = 0
        self._returned: list[int] = []
        """Steps whose scorer died: a heap, and the first to be done."""
        self._served: dict[int, list[Any]] = {}
        self._failure: Exception | None = None
        self._weights: dict[int, Any] = {}
        self._at: list[int] = []
        """The step that each worker asked for last."""
        self._there: set[int] = set()
        """Places whose scorer has answered."""
        self._deaths = 0

    async def begin(self, first_step: int, world_size: int) -> None:
        """A worker group begins at a step; all that an earlier one wanted is forgotten."""
        for place in self._places:
            place.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)
        self._next, self._world_size, self._returned = first_step, world_size, []
        self._served, self._failure, self._weights = {}, None, {}
        self._at = [first_step] * world_size
        self._places = [asyncio.create_task(self._place(index)) for index in range(len(self._scorers))]

    async def publish(self, version: int, weights: list[Any]) -> None:
        """The learner's state after `version` steps, as a reference in a list."""
        async with self._changed:
            self._weights[version] = weights[0]
            self._changed.notify_all()

    async def take(self, step: int, rank: int) -> tuple[Any, list[Any]]:
        """A step's facts, and the reference of a worker's part of it, in a list. Waits until it has been scored.

        RayTaskError, RayActorError where the step cannot be scored.
        """
        async with self._changed:
            self._at[rank] = step
            done = min(self._at)
            self._served = {number: parts for number, parts in self._served.items() if number >= done}
            oldest = self._version_for(done)
            self._weights = {version: state for version, state in self._weights.items() if version >= oldest}
            await self._changed.wait_for(lambda: step in self._served or self._failure)
            if step not in self._served and self._failure:
                raise self._failure
            facts, *parts = self._served[step]
        return facts, [parts[rank]] if parts else []

    async def state(self) -> dict[str, int]:
        """How many scorers there may be, how many are there, and how many have died."""
        return {"places": len(self._scorers), "scorers": len(self._there), "deaths": self._deaths}

    async def _place(self, index: int) -> None:
        """One scorer at a time, for as long as workers ask."""
        deaths = 0
        while True:
            if self._scorers[index] is None:
                self._scorers[index] = self._new_scorer()
            scorer, claimed, before = self._scorers[index], set(), len(self._served)
            try:
                await scorer.begin.remote()
                self._there.add(index)
                await self._work(scorer, claimed)
            except RayActorError as error:
                self._scorers[index] = None
                self._there.discard(index)
                self._deaths += 1
                deaths = 0 if len(self._served) > before else deaths + 1
                async with self._changed:
                    for step in claimed:
                        heapq.heappush(self._returned, step)
                    if deaths == DEATHS_IN_A_ROW:
                        self._failure = error
                    self._changed.notify_all()
                if deaths == DEATHS_IN_A_ROW:
                    return
            except Exception as error:  # the same would happen to any scorer
                async with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return

    async def _work(self, scorer: Any, claimed: set[int]) -> None:
        """Read one super-batch ahead of the one that is scored; what is claimed and not served is in `claimed`."""
        held: set[int] = set()

        async def read() -> None:
            while True:
                step = await self._claim(claimed)
                await scorer.read.options(concurrency_group="read").remote(step)
                async with self._changed:
                    held.add(step)
                    self._changed.notify_all()

        async def serve() -> None:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: any(self._can_score(step) for step in held))
                    step = min(filter(self._can_score, held))
                    version = self._version_for(step)
                    weights = [self._weights[version]]
                    held.discard(step)
                served = scorer.serve.options(concurrency_group="score", num_returns=1 + self._world_size).remote(
                    step, version, weights, self._world_size
                )
                facts = await served[0]
                async with self._changed:
                    claimed.discard(step)
                    self._served[step] = [facts, *served[1:]]
                    self._changed.notify_all()

        both = [asyncio.create_task(read()), asyncio.create_task(serve())]
        try:
            await asyncio.gather(*both)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _claim(self, claimed: set[int]) -> int:
        """The next step that nobody works on; a step that was lost is taken even where there is no room."""
        last = self._serving.num_steps
        async with self._changed:
            await self._changed.wait_for(lambda: self._returned or (len(claimed) < HELD_BLOCKS and self._next < last))
            if self._returned:
                step = heapq.heappop(self._returned)
            else:
                step, self._next = self._next, self._next + 1
            claimed.add(step)
        return step

    def _version_for(self, step: int) -> int:
        """The weights that a step is scored with; before that many were published in this attempt, its first."""
        return max(self._serving.version(step), min(self._weights, default=0))

    def _can_score(self, step: int) -> bool:
        return self._version_for(step) in self._weights


def start_pool(spec: LoopSpec, settings: OnlineSettings, *, device: str) -> Any:
    """The pool of a run; its scorers are made when the workers begin. It lives no longer than the process that asks."""
    train, on_gpu = spec.recipe.train, device == "cuda"
    resources = {"num_cpus": 0 if on_gpu else 1, "num_gpus": 1 if on_gpu else 0}

    def new_scorer() -> Any:
        return scorer_actor(Scorer, **resources).remote(spec, settings, device)

    serving = Serving(settings.num_steps, train.score_ahead, train.publish_every)
    return pool_actor(serving, spec.recipe.compute.scoring_actors, new_scorer)


def scorer_actor(scorer: type, **resources: float) -> Any:
    """The actor class of a scorer: it reads ahead while another super-batch is scored; the pool replaces the dead."""
    groups = {"read": 1, "score": 1}
    return cast(Any, ray).remote(max_restarts=0, concurrency_groups=groups, **resources)(scorer)


def pool_actor(serving: Serving, num_scorers: int, new_scorer: Callable[[], Any]) -> Any:
    """A ScoringPool that has been started: all workers of a run may wait in it at the same time."""
    return cast(Any, ray).remote(num_cpus=0, max_concurrency=1000)(ScoringPool).remote(serving, num_scorers, new_scorer)


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


def close_pool(pool: Any) -> None:
    """End the pool and its scorers."""
    with contextlib.suppress(RayActorError):
        ray.kill(pool)
