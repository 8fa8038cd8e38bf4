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
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import RayActorError

from curation.distributed.ready_batches import LoopSpec
from curation.distributed.scorer import Scorer
from curation.training.online_step import OnlineSettings

HELD_BLOCKS = 2
"""Super-batches that a scorer holds: one that it scores, and one that it has read ahead."""
DEATHS_IN_A_ROW = 5
"""So often may a place's scorers die without serving anything, before the run hears of it."""


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


def close_pool(pool: Any) -> None:
    """End the pool and its scorers."""
    with contextlib.suppress(RayActorError):
        ray.kill(pool)
