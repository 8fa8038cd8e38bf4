"""Who works on which shard: what finds a dead worker's notes, and looks what the living ones do.

One small actor beside the driver. A worker asks it before it takes a shard; if another began that shard and
did not end, a task on that worker's node looks whether it lives, and reads its notes if it does not. So a death counts
only where its node is still there to tell: a node that is lost or drained takes its workers with it and says nothing.
A stall is looked into the same way (stall_watch.py): each worker's notes, read where it runs. What lasts too long is
killed, and Ray redoes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from curation.data.attempts import (
    CRASHES_WORKER,
    NOWHERE,
    Deaths,
    Doing,
    Step,
    Turns,
    Verdict,
    WorkRecord,
    read_work,
)
from curation.data.lease import is_running, process_started
from curation.data.samples import Sample

ASK_TIMEOUT_S = 60.0
"""How long a node may take to answer; longer than Ray takes to find out that one is gone."""
CALLERS = 64
NAME = "curation-roster"
"""The actor's, in the namespace of its driver's job."""
SLOTS = 4096
"""Steps under way in a process: its decode threads, and a few for each shard."""
S = TypeVar("S", bound=Sample)


class Worker(NamedTuple):
    """A process that works on a run's shards, and where its notes lie."""

    run: str
    name: str
    node: str
    host: str
    pid: int
    started: str
    notes: str


class Seen(NamedTuple):
    """What was found of a worker on its node."""

    alive: bool
    doing: list[Doing]
    killed: bool = False


class Held(NamedTuple):
    """A worker, the shards that it holds with the seconds since it took each, and what was seen of it, if anything."""

    worker: Worker
    shards: dict[int, float]
    seen: Seen | None


class Roster:
    """The actor, for all runs of a driver. Calls come from many workers at a time; none waits for another's look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deaths: defaultdict[str, Deaths] = defaultdict(Deaths)
        self._held: defaultdict[tuple[str, str, int], dict[Worker, float]] = defaultdict(dict)
        self._workers: set[Worker] = set()
        self._looking = threading.Lock()

    def begin(self, worker: Worker, what: str, shard: int) -> Verdict:
        """A worker takes a shard; `what` it does with it. What deaths say of that shard."""
        with self._lock:
            self._workers.add(worker)
            others = [other for other in self._held[worker.run, what, shard] if other != worker]
        if others:  # one that a look has killed is blamed for what wedged it alone, which that look has yet to note
            with self._looking:
                pass
        for other in others:
            seen = _answer(_ask(other, wedged_after_s=None), timeout_s=ASK_TIMEOUT_S)
            if seen is None or not seen.alive:
                self._gone(other, seen)
        with self._lock:
            self._held[worker.run, what, shard][worker] = time.monotonic()
            return self._deaths[worker.run].verdict(shard)

    def end(self, worker: Worker, what: str, shard: int) -> None:
        """The worker is through with the shard, whatever came of it."""
        with self._lock:
            self._held[worker.run, what, shard].pop(worker, None)
            if not self._held[worker.run, what, shard]:
                del self._held[worker.run, what, shard]

    def verdict(self, run: str, shard: int) -> Verdict:
        """What deaths say of a shard."""
        with self._lock:
            return self._deaths[run].verdict(shard)

    def look(self, run: str, *, wedged_after_s: float) -> list[Held]:
        """Each worker of the run that holds a shard; a step beyond `wedged_after_s` costs its worker its life."""
        with self._looking:
            seen = self._look(run, wedged_after_s)
            with self._lock:
                for worker, _, what in seen:
                    if what is not None and what.killed:
                        # A store that hangs and a model that is slow must not cost a shard.
                        stuck = [do for do in what.doing if do.step is Step.DECODE and do.seconds > wedged_after_s]
                        self._deaths[run].note(worker.name, stuck, held=())
        return seen

    def forget(self, run: str) -> None:
        """Remove what is known of a run, and its workers' notes."""
        with self._lock:
            gone = {worker for worker in self._workers if worker.run == run}
            self._workers -= gone
            self._deaths.pop(run, None)
            for key in [key for key in self._held if key[0] == run]:
                del self._held[key]
        removed = [_task(_remove, worker).remote(worker.notes) for worker in gone]
        if removed:
            ray.wait(removed, num_returns=len(removed), timeout=5)

    def _look(self, run: str, wedged_after_s: float) -> list[Held]:
        now = time.monotonic()
        with self._lock:
            held: defaultdict[Worker, dict[int, float]] = defaultdict(dict)
            for (of_run, _, shard), workers in self._held.items():
                for worker, since in workers.items() if of_run == run else ():
                    held[worker][shard] = now - since
        asked = {worker: _ask(worker, wedged_after_s=wedged_after_s) for worker in held}
        until = time.monotonic() + ASK_TIMEOUT_S
        return [
            Held(worker, held[worker], _answer(answer, timeout_s=max(0.0, until - time.monotonic())))
            for worker, answer in asked.items()
        ]

    def _gone(self, worker: Worker, seen: Seen | None) -> None:
        with self._lock:
            shards = [shard for (_, _, shard), workers in self._held.items() if worker in workers]
            for workers in self._held.values():
                workers.pop(worker, None)
            if seen is not None:
                self._deaths[worker.run].note(worker.name, seen.doing, held=shards)


def _ask(worker: Worker, *, wedged_after_s: float | None) -> ray.ObjectRef | None:
    """A look at the worker, by its node; None if that node is being taken."""
    # No public call tells it; Ray Train asks here, too.
    draining = ray._private.state.state.get_draining_nodes()  # pyright: ignore
    return None if worker.node in draining else _task(look_at, worker).remote(worker, wedged_after_s)


def _answer(asked: ray.ObjectRef | None, *, timeout_s: float) -> Seen | None:
    """What the node tells; None if it is gone, is being taken, or does not answer."""
    if asked is None:
        return None
    try:
        return ray.get(asked, timeout=timeout_s)
    except RayError:
        return None


def _task(function: Callable[..., Any], worker: Worker) -> Any:
    strategy = NodeAffinitySchedulingStrategy(worker.node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy)


def look_at(worker: Worker, wedged_after_s: float | None) -> Seen:
    """Runs as a task on the worker's node."""
    alive = is_running(worker.pid, worker.started)
    try:
        doing = read_work(worker.notes)
    except FileNotFoundError:
        doing = []
    is_wedged = wedged_after_s is not None and any(step.seconds > wedged_after_s for step in doing)
    if alive and is_wedged:
        os.kill(worker.pid, signal.SIGKILL)  # stopped or in C code, it hears nothing else
    return Seen(alive, doing, killed=alive and is_wedged)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# In a worker.


@dataclass(frozen=True)
class Bench:
    """Where a process does its attempts."""

    record: WorkRecord
    turns: Turns
    begin: Callable[[str, int], Verdict]
    end: Callable[[str, int], None]

    @contextlib.contextmanager
    def attempt(self, what: str, shard: int) -> Iterator[Attempt]:
        """An attempt to do `what` with a shard; it is noted from the block's begin to its end."""
        try:
            yield Attempt(self, shard, self.begin(what, shard))
        finally:
            self.end(what, shard)


@functools.cache
def bench(run: str) -> Bench:
    """This process's bench in the run that is enrolled under that name; "": nobody asks."""
    record, turns = WorkRecord(slots=SLOTS), Turns()
    if not run:
        os.unlink(record.path)
        return Bench(record, turns, lambda what, shard: Verdict(), lambda what, shard: None)
    context = ray.get_runtime_context()
    actor: Any = ray.get_actor(NAME)
    me = Worker(
        run,
        context.get_worker_id(),
        context.get_node_id(),
        ray.util.get_node_ip_address(),
        os.getpid(),
        process_started(os.getpid()),
        record.path,
    )
    return Bench(
        record,
        turns,
        begin=lambda what, shard: ray.get(actor.begin.remote(me, what, shard)),
        end=lambda what, shard: actor.end.remote(me, what, shard),
    )


class Attempt:
    """One worker's attempt at one shard; each step is noted before it is taken."""

    def __init__(self, bench: Bench, shard: int, verdict: Verdict):
        self._bench, self._shard, self._verdict = bench, shard, verdict

    @property
    def is_set_aside(self) -> bool:
        """True if the whole shard is not to be touched."""
        return self._verdict.whole

    def reading(self, samples: Iterable[S]) -> Iterator[S]:
        """The samples; those that are set aside come without what crashes workers, with that reason."""
        rest, offset = iter(samples), NOWHERE
        while True:
            with self._bench.record.doing(Step.READ, self._shard, offset):
                sample = next(rest, None)
            if sample is None:
                return
            offset = sample.offset
            if offset in self._verdict.set_aside:
                sample = dataclasses.replace(sample, image=None, reason=sample.reason or CRASHES_WORKER)
            yield sample

    @contextlib.contextmanager
    def decode(self, offset: int) -> Iterator[None]:
        """While a sample is decoded; a suspect alone."""
        turns = self._bench.turns
        with (
            turns.alone() if offset in self._verdict.suspects else turns.together(),
            self._bench.record.doing(Step.DECODE, self._shard, offset),
        ):
            yield

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """While the model runs."""
        with self._bench.turns.together(), self._bench.record.doing(Step.FORWARD, self._shard):
            yield

    def write(self) -> contextlib.AbstractContextManager[None]:
        """While the table is written and committed."""
        return self._bench.record.doing(Step.WRITE, self._shard)


# Beside the driver.

_actors: dict[str, Any] = {}
"""By the driver's node: the handle that was got when the actor was made. Ray ends an actor when that one is gone, even
if others, got by its name, are still there. A new Ray has new nodes."""


@contextlib.contextmanager
def enrolled() -> Iterator[str]:
    """The name of a run that the roster keeps. Its actor is on the driver's node, and is gone with the driver."""
    run, node = secrets.token_hex(8), ray.get_runtime_context().get_node_id()
    if node not in _actors:  # to start one for each run of many short ones would cost more than they do
        _actors.clear()
        _actors[node] = _started(node)
    try:
        yield run
    finally:
        with contextlib.suppress(RayError):
            ray.get(_actors[node].forget.remote(run), timeout=10)


def _started(node: str) -> Any:
    return (
        ray.remote(Roster)
        .options(
            name=NAME,
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=CALLERS,
            max_restarts=-1,  # a roster that lost its memory counts from nothing; the run goes on
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote()
    )


def verdict_of(run: str, shard: int) -> Verdict:
    """What the roster knows of a run's shard."""
    told: Any = ray.get(ray.get_actor(NAME).verdict.remote(run, shard)) if run else Verdict()
    return told
